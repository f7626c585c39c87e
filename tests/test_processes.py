"""How processes are started, and what each of them gets."""

import pytest
import torch

from tarflowlm import processes
from tarflowlm.config import TrainConfig
from tarflowlm.errors import UserError
from tarflowlm.processes import ALONE, Processes


@pytest.fixture
def launcher(monkeypatch):
    """launcher(NAME=value): the environment of a process, without what a launcher sets here."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def apply(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return apply


def test_machines_whose_restart_would_hang_are_refused(launcher):
    launcher(RANK=0, WORLD_SIZE=2, GROUP_WORLD_SIZE=2, TORCHELASTIC_USE_AGENT_STORE=True)
    with (
        pytest.raises(UserError, match=r"2 machines.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        processes.launched(torch.device("cpu")),
    ):
        pass


def test_several_tasks_of_slurm_need_torchrun(launcher):
    launcher(SLURM_NTASKS=8)  # of the job: a command without srun is one process
    with processes.launched(torch.device("cpu")) as one:
        assert one == ALONE
    launcher(SLURM_STEP_NUM_TASKS=8)
    with (
        pytest.raises(UserError, match="8 Slurm tasks without torchrun"),
        processes.launched(torch.device("cpu")),
    ):
        pass


def test_every_process_has_a_gpu_of_its_own(launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    gpu = torch.device("cuda")
    # Kubernetes sets no LOCAL_RANK
    assert processes.own_device(gpu, 6) == torch.device("cuda:2")
    launcher(LOCAL_RANK=3)
    assert processes.own_device(gpu, 6) == torch.device("cuda:3")
    # a program that has made the group may have chosen
    assert processes.own_device(torch.device("cuda:1"), 6) == torch.device("cuda:1")
    launcher(LOCAL_RANK=5)
    with pytest.raises(UserError, match="--nproc-per-node 4"):
        processes.own_device(gpu, 6)


def test_a_batch_is_divided_evenly():
    train = TrainConfig(batch_size=4)
    assert Processes(world=2).rows_each(train) == 2
    with pytest.raises(UserError, match=r"train\.batch_size 4: use a multiple of 3"):
        Processes(world=3).rows_each(train)
