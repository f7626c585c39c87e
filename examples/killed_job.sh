#!/usr/bin/env bash
# Show that a killed job of two processes ends with the weights of one that was never killed, with DDP and with FSDP2:
#
#   bash examples/killed_job.sh mini-ar mini-affine mini-mix1 mini-mixd mini-mixd-p2
#
# torchrun starts its processes again after each of two kills. Models are small, and a stage has 20 steps.
set -euo pipefail
export TARFLOWLM_CACHE OMP_NUM_THREADS=1
folder=$(mktemp -d) TARFLOWLM_CACHE=$folder/cache
python -c "import random; r = random.Random(3); print(' '.join(r.choice('the cat sat on a mat and saw nine old men quick dogs zebra'.split()) for _ in range(7000)))" > "$folder/words.txt"
for preset in "$@"; do
    for parallel in ddp fsdp; do
        run=$folder/$preset-$parallel
        train=(--nproc-per-node 2 --standalone --max-restarts 2 -m tarflowlm train "$preset" --data "$folder/words.txt" --steps 60
            --checkpoint-every 5 --model.context 32 --model.trunk.width 32 --train.batch-size 4 --train.log-every 1
            --train.evaluate-every 7 --train.evaluate-windows 6 --train.test-windows 6 --train.ema 0.9 --train.keep best
            --train.dropout 0.1 --train.parallel "$parallel" --optim.optimizer "$([ "$parallel" = ddp ] && echo muon || echo adamw)")
        torchrun "${train[@]}" --out "$run-whole" > "$run-whole.log" 2>&1
        torchrun "${train[@]}" --out "$run-killed" > "$run-killed.log" 2>&1 &
        launcher=$!
        for lines in 17 52; do
            until [ "$(cat "$run-killed/metrics.jsonl" 2> /dev/null | wc -l)" -ge "$lines" ]; do sleep 0.05; done
            kill -KILL "$(pgrep -P "$launcher" | tail -n 1)"
            sleep 3
        done
        wait "$launcher"
        python - "$run" << 'PY'
import sys, torch
from safetensors.torch import load_file
run, same = sys.argv[1], True
for part in ("", "/best"):
    whole, killed = (load_file(f"{run}-{kind}{part}/model.safetensors") for kind in ("whole", "killed"))
    same &= whole.keys() == killed.keys() and all(torch.equal(t, killed[name]) for name, t in whole.items())
print(f"{run.rsplit('/')[-1]}: weights and best weights {'are the same bits' if same else 'DIFFER'}")
PY
    done
done
rm -r "$folder"
