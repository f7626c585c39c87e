"""The pretend accelerator: it refuses what a GPU refuses, counts, and leaves nothing behind."""

import threading

import pytest
import torch

from pretend_device import pretend

X = torch.arange(6.0).view(2, 3)


@pytest.fixture
def gpu():
    with pretend("cuda") as device:
        yield device


@pytest.mark.usefixtures("gpu")
def test_tensors_say_where_they_are():
    for y in (X.cuda(), X.to("cuda"), torch.ones(2, device="cuda"), X.to(torch.ones(1).cuda())):
        assert (y.device, y.is_cuda, y.is_cpu) == (torch.device("cuda:0"), True, False)
    y = X.cuda()
    assert torch.zeros_like(y).is_cuda
    assert y[0].is_cuda
    assert y.double().is_cuda
    assert y.cpu().equal(X)
    assert y.cpu().is_cpu
    assert torch.nn.Linear(2, 2).to("cuda").weight.is_cuda
    with torch.device("meta"):
        assert torch.zeros(2).is_meta


@pytest.mark.usefixtures("gpu")
def test_two_devices_do_not_mix():
    y = X.cuda()
    for mix in (
        lambda: y + X,
        lambda: torch.cat((y, X)),
        lambda: y.index_copy_(0, torch.tensor([0]), y[:1]),
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        lambda: torch.rand(2, device="cpu", generator=torch.Generator("cuda")),
        lambda: torch.zeros(2, device="cuda:1"),
        lambda: X.to("mps"),
    ):
        with pytest.raises(RuntimeError):
            mix()
    assert (y + torch.tensor(1.0)).is_cuda
    assert torch.where(y > 2, y, 0.0).sum().item() == 12.0
    with pytest.raises(TypeError, match="numpy"):
        y.numpy()


def test_waits_and_launches_are_counted(gpu):
    y = X.cuda()
    index = torch.tensor([1, 0])
    for act, waits in {
        (lambda: y.view(3, 2).T[:1], 0),
        (lambda: y * 2, 0),
        (lambda: y[index.cuda()], 1),
        (lambda: y[index], 1),
        (lambda: y[y > 2], 1),
        (lambda: float(y.sum()), 1),
        (lambda: bool((y > 9).any()), 1),
        (lambda: y.tolist(), 1),
        (lambda: y.nonzero(), 1),
        (lambda: torch.tensor([1.0], device="cuda"), 1),
        (lambda: X.to("cuda", non_blocking=True), 1),
        (lambda: X.pin_memory().to("cuda", non_blocking=True), 0),
        (lambda: y.cpu(), 1),
    }:
        with gpu.counting() as counted:
            act()
        assert counted.num_waits == waits, str(counted)
    with gpu.counting() as counted:
        (y * 2 + y).view(-1).sum()
    assert counted.launches == {"mul": 1, "add": 1, "sum": 1}


def test_gradients_are_those_of_a_cpu(gpu):
    weight, there = X.clone().requires_grad_(), X.cuda().requires_grad_()
    (weight.exp() @ X.T).sum().backward()
    (there.exp() @ X.cuda().T).sum().cpu().backward()
    assert there.grad.is_cuda
    assert there.grad.cpu().equal(weight.grad)


def test_bytes_are_counted(gpu):
    y = torch.zeros(1000, device="cuda")
    with gpu.counting():
        assert gpu.peak == gpu.alive == 4000
        z = y + 1
        view = z.view(10, 100)
        del z
        assert gpu.alive == 8000
        del view
        assert gpu.alive == 4000
    assert gpu.peak == 8000


@pytest.mark.usefixtures("gpu")
def test_autocast_is_that_of_cuda():
    y = X.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        product = y @ y.T
        assert product.dtype is torch.bfloat16
        assert torch.nn.functional.layer_norm(product, (2,)).dtype is torch.float32
        assert product.sum().dtype is torch.float32
        assert product.exp().dtype is torch.float32
        assert torch.addcmul(product, product, y @ y.T * 1.0).dtype is torch.bfloat16
        assert torch.addcmul(y[:, :2], product, product).dtype is torch.float32
        assert torch.nn.functional.gelu(product).dtype is torch.bfloat16
        assert (y.double() @ y.double().T).dtype is torch.float64
    assert (y @ y.T).dtype is torch.float32


def test_mps_has_no_float64():
    with pretend("mps"):
        y = X.to("mps")
        for widen in (
            y.double,
            lambda: X.double().to("mps"),
            lambda: torch.zeros(1, dtype=torch.float64, device="mps"),
        ):
            with pytest.raises(TypeError, match="float64"):
                widen()
        assert y.to("cpu", torch.float64).dtype is torch.float64


def test_a_thread_sees_the_device_and_nothing_is_left(gpu):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(1, device="cuda").is_cuda))
    thread.start()
    thread.join()
    assert found == [True]


def test_nothing_is_left_behind():
    before = torch.Generator, torch.compile, torch.cuda.is_available()
    with pretend("cuda"):
        assert torch.cuda.is_available()
    assert before == (torch.Generator, torch.compile, torch.cuda.is_available())
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1, device="cuda")
