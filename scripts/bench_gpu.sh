#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All checks and measurements on a GPU, and one archive of their results to send back:
#
#     scripts/bench_gpu.sh [FOLDER]        # default results/gpu; takes hours for 7B models on one GPU of 80 GB
#
# DEVICE (default cuda), PYTHON (default python) and SHAPES (names of `vtprune bench`) can be set in the environment.
# DEVICE=cpu tries out every step on a small model. A step that fails does not stop the others; its log says why, and
# the exit code is 1.
set -uo pipefail
FOLDER=$(realpath -m "${1:-$(dirname "$0")/../results/gpu}")
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python}
if [ "$DEVICE" = cpu ]; then
    SHAPES=${SHAPES:-small}
    DOCTOR=(--family llava)
    BENCH=(--repeats 1 --methods uniform,fastv)
    STALLS=(--methods divprune,fastv)
    TESTS=(-k "divprune or fastv")
    COMPILED=() # the compiler takes minutes on a CPU; tests of `vtprune bench` compile steps there
else
    SHAPES=${SHAPES:-llava-1.5-7b llava-next-7b llava-onevision-7b qwen2.5-vl-7b internvl3-8b}
    DOCTOR=()
    BENCH=(--keep-ratio 0.33 --keep-ratio 0.11)
    STALLS=()
    TESTS=()
    COMPILED=(--compile)
fi
BACK_ENDS=(sdpa)
if "$PYTHON" -c "import flash_attn" 2> /dev/null; then BACK_ENDS+=(flash_attention_2); fi

if [ -e "$FOLDER" ]; then
    echo "$FOLDER is there already" >&2
    exit 2
fi
mkdir -p "$FOLDER" || exit 2
FAILED=0

# step NAME COMMAND...: its output goes to NAME.txt, and how it ended to summary.txt
step() {
    local name=$1 started=$SECONDS ended=ok
    shift
    "$@" > "$FOLDER/$name.txt" 2>&1 || { ended="FAILED ($?)"; FAILED=1; }
    echo "$name: $ended, $((SECONDS - started)) s" | tee -a "$FOLDER/summary.txt"
}

if command -v nvidia-smi > /dev/null; then step machine nvidia-smi; fi
step packages "$PYTHON" -c "
from importlib.metadata import distributions
print(*sorted(f'{d.name}=={d.version}' for d in distributions()), sep='\n')"
step doctor-float32 "$PYTHON" -m vtprune doctor --device "$DEVICE" "${DOCTOR[@]}"
for back_end in "${BACK_ENDS[@]}"; do
    step "doctor-bfloat16-$back_end" "$PYTHON" -m vtprune doctor --device "$DEVICE" --dtype bfloat16 \
        --attention "$back_end" "${DOCTOR[@]}"
done
VTPRUNE_TEST_DEVICE=$DEVICE step tests "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/conformance/test_on_a_device.py "${TESTS[@]}"
for shape in $SHAPES; do
    step "stalls-$shape" "$PYTHON" scripts/bench_stalls.py --shape "$shape" --layers 4 --device "$DEVICE" \
        --output "$FOLDER/stalls-$shape.json" "${STALLS[@]}"
    for back_end in "${BACK_ENDS[@]}"; do
        step "bench-$shape-$back_end" "$PYTHON" -m vtprune bench --shape "$shape" --device "$DEVICE" \
            --dtype bfloat16 --attention "$back_end" --batch-sizes 1,8 \
            --output "$FOLDER/bench-$shape-$back_end" "${BENCH[@]}"
    done
    step "bench-$shape-static" "$PYTHON" -m vtprune bench --shape "$shape" --device "$DEVICE" \
        --dtype bfloat16 --cache static "${COMPILED[@]}" --batch-sizes 1,8 \
        --output "$FOLDER/bench-$shape-static" "${BENCH[@]}"
done

tar -czf "$FOLDER.tar.gz" -C "$(dirname "$FOLDER")" "$(basename "$FOLDER")"
echo "send back $FOLDER.tar.gz"
exit "$FAILED"
