# shellcheck shell=bash
# Sourced by the three entries: fills `candidates` from their variables.
read -ra candidates <<<"${CANDIDATES:-}"

# A codec as it is followed by an option.
before_option() {
    case $1 in
    *:*) echo "$1," ;;
    *) echo "$1:" ;;
    esac
}

# Learned models MODELS, plain, with EFFORT, or also at each of LMBDAS.
add_learned() {
    local models lmbdas model
    read -ra models <<<"${MODELS:-$1}"
    read -ra lmbdas <<<"${LMBDAS:-}"
    for model in "${models[@]}"; do
        if [[ ${#lmbdas[@]} -gt 0 ]]; then
            candidates+=("${lmbdas[@]/#/$(before_option "$model")effort=${EFFORT:-3},lmbda=}")
        elif [[ ${EFFORT:-0} -gt 0 ]]; then
            candidates+=("$(before_option "$model")effort=$EFFORT")
        else
            candidates+=("$model")
        fi
    done
}

# The shipped network for MS-SSIM, one for all rates, or MODELS.
add_shipped_ssim() {
    add_learned "$(echo tiny-vbr-ssim:quality={0,1,1.5,2,2.5,3,3.5,4,5,6})"
}

# Codecs CODECS at each of QPS; options of a codec follow a colon: "vvc:preset=slow".
add_swept() {
    local codecs qps codec
    read -ra codecs <<<"${CODECS:-$1}"
    read -ra qps <<<"${QPS:-$2}"
    for codec in "${codecs[@]}"; do
        candidates+=("${qps[@]/#/$(before_option "$codec")qp=}")
    done
}

# Codes and chooses: the words of the command line, then those of the entry.
allocate() {
    "${PYTHON:-python3}" -m lightning_tucodec.cli allocate "${words[@]}" \
        --candidate "${candidates[@]}" "$@"
}
words=("$@")
