# Turns lines "KVM <tab> WHAT <tab> VMM <tab> VALUE" into a table of medians, with the best of the runs in brackets.
BEGIN { FS = "\t" }
!(($1, $2) in known) { known[$1, $2] = ++rows; where[rows] = $1; what[rows] = $2 }
{ row = known[$1, $2]; values[row, $3, ++count[row, $3]] = $4 }

# Sorts the values of a row and VMM, the best first.
function sort(row, vmm,    i, j, value) {
    for (i = 2; i <= count[row, vmm]; i++) {
        value = values[row, vmm, i]
        for (j = i; j > 1 && (more[row] ? values[row, vmm, j - 1] < value : values[row, vmm, j - 1] > value); j--)
            values[row, vmm, j] = values[row, vmm, j - 1]
        values[row, vmm, j] = value
    }
}

function median(row, vmm,    n) {
    n = count[row, vmm]
    return n % 2 ? values[row, vmm, (n + 1) / 2] : (values[row, vmm, n / 2] + values[row, vmm, n / 2 + 1]) / 2
}

function short(value) { return sprintf(value < 10 ? "%.2f" : value < 100 ? "%.1f" : "%.0f", value) }

function show(row, vmm,    n) {
    n = count[row, vmm]
    return !n ? "-" : short(median(row, vmm)) (n > 1 ? " (" short(values[row, vmm, 1]) ")" : "")
}

# The rows of the two VMMs; of runc only those that it has figures for, and only there those that QEMU has none for.
function print_table(peer, title,    row, ratio, verdict, better) {
    print "| KVM | measured: median (best) | bantam | " title " | bantam / " title " | runs | bantam is |"
    print "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for (row = 1; row <= rows; row++) {
        if (!count[row, peer] && (peer == "runc" || count[row, "runc"])) continue
        more[row] = what[row] ~ /\/s$/
        sort(row, "bantam")
        sort(row, peer)
        ratio = "-"
        verdict = ""
        if (count[row, "bantam"] && count[row, peer] && median(row, "bantam") > 0 && median(row, peer) > 0) {
            ratio = median(row, "bantam") / median(row, peer)
            better = more[row] ? ratio : 1 / ratio
            verdict = better > 1.05 ? "better" : better < 0.95 ? "worse" : "even"
            ratio = sprintf("%.2f", ratio)
        }
        printf "| %s | %s | %s | %s | %s | %d | %s |\n", where[row], what[row], show(row, "bantam"), show(row, peer),
            ratio, count[row, "bantam"], verdict
    }
}

END {
    print_table("qemu", "QEMU microvm")
    for (row = 1; row <= rows; row++) runc += count[row, "runc"]
    if (runc) {
        print ""
        print_table("runc", "runc")
    }
}
