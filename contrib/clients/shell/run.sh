#!/bin/bash
# Run a command as a job, print its output, stop it on Ctrl-C; with bash, openssl, od and jq alone.
#
#   ./run.sh sh -c 'echo hello; sleep 60'
#
# Server and certificates come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
# WORKER_CA_PATH. Output comes as text in JSON: bytes that are not UTF-8 become U+FFFD. If the
# connection is lost, the service is restarted, or this machine slept, it connects again and resumes.
set -eu

for name in WORKER_SERVER WORKER_CERT_PATH WORKER_KEY_PATH WORKER_CA_PATH; do
    [ -n "${!name:-}" ] || { echo "cannot connect: not set in the environment: $name" >&2; exit 78; }
    [ "$name" = WORKER_SERVER ] || [ -r "${!name}" ] || {
        echo "cannot use $name: ${!name} cannot be read" >&2
        exit 72
    }
done

host=${WORKER_SERVER%:*}
case $host in
*:* | *[0-9].*[0-9].*[0-9].*[0-9]) name=-verify_ip ;;
*) name=-verify_hostname ;;
esac

# A write to a lost connection is ignored: the next read finds out.
byte() { printf "\\x$(printf %02x "$1")" >&4; } 2>/dev/null

# send JSON: sends one text frame (RFC 6455, 5.2), with a mask of zeroes, which does not change it.
send() {
    local size
    size=$(printf %s "$1" | wc -c)
    byte 129
    if [ "$size" -lt 126 ]; then
        byte $((128 | size))
    else
        local shift shifts='8 0' code=254
        if [ "$size" -ge 65536 ]; then # a length must have its shortest form
            shifts='56 48 40 32 24 16 8 0' code=255
        fi
        byte "$code"
        for shift in $shifts; do byte $(((size >> shift) & 255)); done
    fi
    printf '\0\0\0\0%s' "$1" >&4
} 2>/dev/null

# take N: prints N bytes as decimal numbers, in a subshell, which ignores Ctrl-C.
take() {
    trap '' INT
    head -c "$1" <&3 | od -An -v -tu1
}

# receive: puts the next text message into $message, and answers pings.
receive() {
    local first size silent
    while :; do
        exec 5< <(take 2) # not $(…), during which no trap would run; one that comes late waits 1 s
        silent=0
        until read -r -t 1 -u 5 first size; do
            [ $? -gt 128 ] || return 1
            silent=$((silent + 1)) # a second: docs/protocol.md, Silence
            [ "$silent" -lt 45 ] || return 1
            [ "$silent" != 15 ] || { byte 137 && byte 128 && printf '\0\0\0\0' >&4; } 2>/dev/null
        done
        [ -n "${size:-}" ] || return 1
        if [ "$size" = 126 ] || [ "$size" = 127 ]; then
            local count=$((size == 126 ? 2 : 8)) number
            size=0
            for number in $(take "$count"); do size=$((size << 8 | number)); done
        fi
        if [ $((first & 15)) = 9 ]; then # a ping: the same bytes go back, few as they are
            local payload number
            payload=$(take "$size")
            byte 138
            byte $((128 | size))
            printf '\0\0\0\0' 2>/dev/null >&4
            for number in $payload; do byte "$number"; done
            continue
        fi
        if [ $((first & 15)) = 8 ]; then # the end, with a code: two bytes
            local high low
            read -r high low <<<"$(take 2)"
            closed=$((high << 8 | low))
            return 1
        fi
        message=$(trap '' INT && timeout 45 head -c "$size" <&3) || return 1
        [ $((first & 15)) = 10 ] || return 0 # else an answer to a ping
    done
}

# connect: opens a connection on descriptors 3 and 4; fails if there is none.
connect() {
    local head= character
    disconnect
    closed=1006 # as long as no other code has come
    # openssl has a session of its own, so that Ctrl-C reaches this script alone.
    coproc TLS {
        exec setsid openssl s_client -quiet -no_ign_eof -verify_return_error -tls1_3 \
            -connect "$WORKER_SERVER" "$name" "${host//[][]/}" \
            -cert "$WORKER_CERT_PATH" -key "$WORKER_KEY_PATH" -CAfile "$WORKER_CA_PATH" 2>/dev/null
    }
    pid=${TLS_PID:-}
    [ -n "${TLS[0]:-}" ] || return 1 # it has ended already
    exec 3<&"${TLS[0]}" 4>&"${TLS[1]}"
    printf '%s\r\n' 'GET / HTTP/1.1' "Host: $WORKER_SERVER" 'Upgrade: websocket' \
        'Connection: Upgrade' 'Sec-WebSocket-Version: 13' \
        "Sec-WebSocket-Key: $(openssl rand -base64 16)" \
        'Sec-WebSocket-Protocol: jobworker.v1' '' 2>/dev/null >&4
    # Read the head of the answer byte by byte, since the first frame follows it.
    while [[ $head != *$'\r\n\r'* ]]; do
        IFS= read -r -t 10 -N 1 -u 3 character || return 1
        head+=$character
    done
    IFS= read -r -N 1 -u 3 character || return 1
    [[ $head == 'HTTP/1.1 101'* ]] || { head -c 2000 <&3 >&2; echo >&2; exit 69; }
}

disconnect() {
    [ -n "${pid:-}" ] || return 0
    exec 3<&- 4>&-
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    pid=
}

request() { jq -cn --arg method "$1" --argjson id "$2" --argjson params "$3" \
    '{jsonrpc: "2.0", id: $id, method: $method, params: $params}'; }

command=$(jq -cn '$ARGS.positional' --args -- "$@")
asked='' job='' offset=0 stopping=''

stop() {
    stopping=1
    if [ -n "$job" ] && [ -n "${pid:-}" ]; then
        send "$(request job.stop 2 "{\"id\": $job}")" 2>/dev/null || true
    fi
}
trap 'stop' INT
trap '' PIPE

# print: prints the text of $message. If its reader has left, this program exits; the job goes on.
print() {
    (trap - PIPE && exec jq -j .params.text <<<"$message") || exit $(($? == 141 ? 141 : 83))
}

# serve: runs the command or resumes its output, until the job or the connection ends.
serve() {
    if [ -z "$job" ]; then
        asked=1
        send "$(request job.run 1 "{\"job\": {\"command\": $command}, \"follow\": {\"encoding\": \"text\"}}")"
    else
        send "$(request job.log 3 "{\"id\": $job, \"offset\": $offset, \"delivery\": {\"encoding\": \"text\"}}")"
        [ -z "$stopping" ] || stop
    fi
    while receive; do
        case $(jq -r '.method // (if .error then "error" else .id end)' <<<"$message") in
        1)
            job=$(jq .result.job.id <<<"$message")
            echo "job $job" >&2
            ;;
        error)
            jq -r .error.message <<<"$message" >&2
            exit 70
            ;;
        job.output)
            if [ "$(jq -r .params.stream <<<"$message")" = stderr ]; then
                print >&2
            else
                print
            fi
            offset=$(jq '.params | .offset + .bytes' <<<"$message")
            ;;
        job.output_end)
            case $(jq -r '.params.error.name // ""' <<<"$message") in
            '') ;;
            shutting_down) continue ;; # the next service has the rest
            *)
                jq -r .params.error.message <<<"$message" >&2
                exit 70
                ;;
            esac
            jq -r '"job \(.params.job.id): \(.params.job.state)"' <<<"$message" >&2
            exit "$(jq '.params.job | .exit_code // (if .signal then 128 + .signal else 125 end)' \
                <<<"$message")"
            ;;
        esac
    done
}

lost_at=
while :; do
    if connect; then
        lost_at=
        serve || true
    fi
    lost_at=${lost_at:-$SECONDS}
    case $closed in # after these the same would come of it: docs/protocol.md, Closing
    1002 | 1007 | 1008 | 1009 | 1011) break ;;
    esac
    [ -n "$job" ] && [ $((SECONDS - lost_at)) -lt 120 ] || break
    sleep 0.5
done
if [ -z "$asked" ]; then
    echo "cannot go on: the connection to $WORKER_SERVER failed" >&2
elif [ -z "$job" ]; then
    echo "cannot go on: the connection to $WORKER_SERVER failed; the job may have been started" >&2
else
    echo "cannot go on: the server closed the connection ($closed)" >&2
fi
exit 69
