"""Train in Ray Train, accelerate or Fabric, which start the processes and their group.

python examples/train_in_an_engine.py ray PRESET OUT --workers 8
torchrun --nproc-per-node 8 examples/train_in_an_engine.py accelerate PRESET OUT
python examples/train_in_an_engine.py fabric PRESET OUT --workers 8

On CPUs, with two workers and for a few steps: --device cpu --workers 2 --steps 12.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import tarflowlm
from tarflowlm.presets import with_steps
from tarflowlm.processes import launched
from tarflowlm.training.train import train


def work(preset: str, out: Path, *, device: str, data: str | None, steps: int | None) -> None:
    """Every process calls this. The engine starts the group, and ends it."""
    run = tarflowlm.preset(preset)
    if data is not None:
        run = replace(run, data=replace(run.data, source=data))
    if steps is not None:
        run = with_steps(run, steps)
    with launched(torch.device(device)) as processes:
        train(run, out, device=processes.device, processes=processes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("engine", choices=["ray", "accelerate", "fabric"])
    parser.add_argument("preset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    out = args.out.absolute()  # Ray's processes work in a folder of their own

    def task(*_: object) -> None:
        work(args.preset, out, device=args.device, data=args.data, steps=args.steps)

    if args.engine == "ray":
        import ray.train.torch

        workers = ray.train.ScalingConfig(num_workers=args.workers, use_gpu=args.device == "cuda")
        ray.train.torch.TorchTrainer(task, scaling_config=workers).fit()
    elif args.engine == "fabric":
        from lightning_fabric import Fabric

        Fabric(accelerator=args.device, devices=args.workers, strategy="ddp").launch(task)
    else:
        import accelerate

        accelerate.PartialState(cpu=args.device == "cpu")
        task()


if __name__ == "__main__":
    main()
