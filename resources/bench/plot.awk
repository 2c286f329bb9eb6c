# Turns lines "KVM <tab> WHAT <tab> VMM <tab> VALUE <tab> ITEM" into folder/ITEM.svg, one for each item: for each thing that was
# measured a bar for each VMM, as long as its median is of the longest one's.
BEGIN {
    FS = "\t"
    split("bantam qemu runc", vmms, " ")
    color["bantam"] = "#2b6cb0"
    color["qemu"] = "#a0aec0"
    color["runc"] = "#d69e2e"
}
!($5 in rows) { items[++count] = $5 }
!(($5, $1, $2) in known) { known[$5, $1, $2] = ++rows[$5]; what[$5, rows[$5]] = $2; where[$5, rows[$5]] = $1 }
{
    row = known[$5, $1, $2]
    values[$5, row, $3, ++runs[$5, row, $3]] = $4
}

function median(item, row, vmm,    n, i, j, value, list) {
    n = runs[item, row, vmm]
    for (i = 1; i <= n; i++) {
        value = values[item, row, vmm, i]
        for (j = i; j > 1 && list[j - 1] > value; j--) list[j] = list[j - 1]
        list[j] = value
    }
    return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
}

function short(value) { return sprintf(value < 10 ? "%.2f" : value < 100 ? "%.1f" : "%.0f", value) }

function text(x, y, anchor, words) {
    gsub(/&/, "\\&amp;", words)
    gsub(/</, "\\&lt;", words)
    return sprintf("<text x=\"%d\" y=\"%d\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, words)
}

function plot(item, file,    row, i, y, body, longest, value, width) {
    y = 30
    for (row = 1; row <= rows[item]; row++) {
        longest = 0
        for (i = 1; i in vmms; i++)
            if (runs[item, row, vmms[i]] && median(item, row, vmms[i]) > longest) longest = median(item, row, vmms[i])
        body = body text(460, y + 11, "end", what[item, row] " (" where[item, row] " KVM)")
        for (i = 1; i in vmms; i++) {
            if (!runs[item, row, vmms[i]]) continue
            value = median(item, row, vmms[i])
            width = longest > 0 ? 300 * value / longest : 0
            body = body sprintf("<rect x=\"470\" y=\"%d\" width=\"%.1f\" height=\"13\" fill=\"%s\"/>\n", y, width, color[vmms[i]])
            body = body text(476 + width, y + 11, "start", short(value) " " vmms[i])
            y += 16
        }
        y += 10
    }
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"880\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", y >file
    printf "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n%s%s</svg>\n", text(470, 18, "start", item ": medians"), body >file
    close(file)
}

END { for (i = 1; i <= count; i++) plot(items[i], folder "/" items[i] ".svg") }
