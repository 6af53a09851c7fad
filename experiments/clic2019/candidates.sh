# shellcheck shell=bash
# Sourced by the three entries: fills `candidates` from their variables.
read -ra candidates <<<"${CANDIDATES:-}"

# Learned models MODELS, plain, with EFFORT, or also at each of LMBDAS.
add_learned() {
    local models lmbdas model
    read -ra models <<<"${MODELS:-$1}"
    read -ra lmbdas <<<"${LMBDAS:-}"
    for model in "${models[@]}"; do
        if [[ ${#lmbdas[@]} -gt 0 ]]; then
            candidates+=("${lmbdas[@]/#/$model:effort=${EFFORT:-3},lmbda=}")
        elif [[ ${EFFORT:-0} -gt 0 ]]; then
            candidates+=("$model:effort=$EFFORT")
        else
            candidates+=("$model")
        fi
    done
}

# Codecs CODECS at each of QPS; options of a codec follow a colon: "vvc:preset=slow".
add_swept() {
    local codecs qps codec
    read -ra codecs <<<"${CODECS:-$1}"
    read -ra qps <<<"${QPS:-$2}"
    for codec in "${codecs[@]}"; do
        case $codec in
        *:*) candidates+=("${qps[@]/#/$codec,qp=}") ;;
        *) candidates+=("${qps[@]/#/$codec:qp=}") ;;
        esac
    done
}

# Codes and chooses: the words of the command line, then those of the entry.
allocate() {
    "${PYTHON:-python3}" -m lightning_tucodec.cli allocate "${words[@]}" \
        --candidate "${candidates[@]}" "$@"
}
words=("$@")
