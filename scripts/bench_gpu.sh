#!/bin/sh
# Checks and times everything that needs a GPU, in one call: the tests marked gpu, then the benchmark in fp16 and bf16 at
# the shapes of Llama-2-7B, Llama-3-8B's step (grouped queries), the expert kernels, one whole run on random weights, time and
# memory of the longer calibrations, and the latency of the other input-sparse methods.
#   PYTHON  interpreter with sparsebench's dependencies     OUT  where records go (default outputs/bench/h200)
#   HISTOGRAMS  folder of published TEAL histograms (optional: inputs follow them instead of a normal distribution)
set -u
python=${PYTHON:-python3}
out=${OUT:-outputs/bench/h200}
target=${HARDWARE:-h200}
inputs=${HISTOGRAMS:+histograms=$HISTOGRAMS}
mkdir -p "$out"
failed=0
step() { # name, command...: runs it, keeps its log, goes on after a failure
    name=$1; shift; started=$(date +%s)
    "$@" >"$out/$name.log" 2>&1 || failed=1
    echo "== $name: $(($(date +%s) - started)) s"; tail -n "${LINES_SHOWN:-60}" "$out/$name.log"
}
bench() { "$python" -m sparsebench.bench hardware="$target" "$@"; }
step tests "$python" -m pytest -m gpu -q tests/gpu
step bench-llama3 bench model=llama3-8b hardware.dtype=bfloat16 'parts=[step]' 'sparsities=[0.0,0.5,0.65,0.9]' output="$out/llama3-8b-bfloat16"
step bench-fp16 bench model=llama2-7b hardware.dtype=float16 $inputs output="$out/llama2-7b-float16"
step bench-bf16 bench model=llama2-7b hardware.dtype=bfloat16 $inputs output="$out/llama2-7b-bfloat16"
step experts-bf16 bench model=llama2-7b hardware.dtype=bfloat16 'parts=[experts]' output="$out/experts-bfloat16"
step experts-fp32 bench model=llama2-7b hardware.dtype=float32 'parts=[experts]' output="$out/experts-float32"
step run "$python" -m sparsebench model=llama2-7b model.weights=random hardware="$target" hardware.dtype=float16 \
    dataset=pystdlib eval.text.test_sequences=16 wandb.mode=disabled output_dir="$out/runs"
fit() { # key=value...: time and memory of a calibration, of its depth cut to four layers where that is long
    "$python" -m sparsebench model=llama2-7b model.weights=random hardware="$target" hardware.dtype=float16 dataset=pystdlib \
        dataset.sequence_length=2048 eval.text.test_sequences=2 eval.text.batch_size=2 measure.latency=false wandb.mode=disabled \
        output_dir="$out/fits" "$@"
}
step fit-rsparse fit method=rsparse
step fit-greedy fit method=teal method.allocation=greedy model.num_layers=4
latency() { # name, key=value...: decode of eight layers with the skipping kernels
    name=$1; shift
    step "latency-$name" "$python" -m sparsebench model=llama2-7b model.weights=random model.num_layers=8 hardware="$target" \
        hardware.dtype=float16 dataset=pystdlib method.sparsity=0.5 eval.text.test_sequences=4 wandb.mode=disabled \
        output_dir="$out/runs" "$@"
}
latency teal method=teal
latency rsparse method=rsparse
latency wina-top-k method=wina_plain
latency wina-threshold method=wina_plain method.selection=threshold
exit $failed
