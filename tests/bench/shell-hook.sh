#!/usr/bin/env bash
# A hook in the manner of shell: for each annotation find the nodes, stat each, and add it with jq. For comparison only;
# it takes no care of stale numbers, of what may be withheld, or of what is no specification.
set -euo pipefail

log() {
    printf '%(%F %T)T - shell-hook - INFO - %s\n' -1 "$*" >>/var/log/shell-hook.log
}

nodes() {
    case $1 in
    audio) find /dev/snd -type c ;;
    video) find /dev -maxdepth 1 -type c -regex '/dev/\(video\|media\)[0-9]+' ;;
    input) find /dev/input -type c ;;
    ttys) find /dev -maxdepth 1 -type c -regex '/dev/tty[0-7]' ;;
    ttyUSB) find /dev -maxdepth 1 -type c -regex '/dev/ttyUSB[0-9]+' ;;
    dvb) find /dev/dvb -type c ;;
    radio) find /dev -maxdepth 1 -type c -regex '/dev/radio[0-9]+' ;;
    esac 2>/dev/null
}

spec=$(cat)
asked=$(jq -r '.annotations // {} | to_entries[] | select(.value | IN("true", "1", "yes")) | .key
    | ltrimstr("org.containers.qm.device.") | select(IN("audio", "video", "input", "ttys", "ttyUSB", "dvb", "radio"))' <<<"$spec")
for category in $asked; do
    log "looking for $category devices"
    while read -r node; do
        read -r major minor mode uid gid < <(stat -c '%Hr %Lr %a %u %g' "$node")
        if jq -e --arg path "$node" 'any(.linux.devices[]?; .path == $path)' <<<"$spec" >/dev/null; then
            continue
        fi
        spec=$(jq -c --arg path "$node" --argjson major "$major" --argjson minor "$minor" --argjson mode "$((8#$mode))" \
            --argjson uid "$uid" --argjson gid "$gid" '
            .linux.devices += [{$path, type: "c", $major, $minor, fileMode: $mode, $uid, $gid}]
            | .linux.resources.devices += [{allow: true, type: "c", $major, $minor, access: "rwm"}]' <<<"$spec")
        log "added $node ($major:$minor)"
    done < <(nodes "$category" | sort)
done
printf '%s\n' "$spec"
