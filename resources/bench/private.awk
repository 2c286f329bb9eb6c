# Private memory of a process (with dirty=1 only what it wrote), in MiB, from its /proc/PID/smaps, less its guest's memory: the
# mappings of at least guest_kib together that follow one another and differ in nothing but advice on huge pages, and in
# being of one of the files in guest_files, its kernel and its initrd.
function flush() {
    if (size < guest_kib) total += private
    size = private = 0
}
/^[0-9a-f]+-[0-9a-f]+ / { split($1, range, "-"); permissions = $2; name = index(guest_files, $6) ? "" : $6; of = 0 }
/^Size:/ { map_size = $2 }
/^Private_Dirty:/ || (/^Private_Clean:/ && !dirty) { of += $2 }
/^VmFlags:/ {
    gsub(/ (hg|nh) /, " ")
    kind = permissions name $0
    if (range[1] != end || kind != last) flush()
    size += map_size
    private += of
    end = range[2]
    last = kind
}
END { flush(); printf "%.2f\n", total / 1024 }
