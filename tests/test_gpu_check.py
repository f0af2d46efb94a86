"""`make gpu-check`, rehearsed on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mupsweep.sweep.config import choices

SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.is_dir():
    pytest.skip("an installed package", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402

CPU = torch.device("cpu")


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a rehearsal."""
    code = gpu_check.main(["--device", "cpu", *arguments])
    return code, capsys.readouterr().out.splitlines()


def test_a_rehearsal_passes(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = lines(capsys, "--only", "environment", "next-run", "optimizer-adamw", "memory")
    words = {line.split()[1]: line.split()[0] for line in printed[:-1]}
    assert code == 0, printed
    assert words == {
        "environment": "INFO",
        "next-run": "PASS",
        "optimizer-adamw": "PASS",
        "optimizer-adamw_hyperball": "PASS",
        "memory": "SKIP",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of its own parts
def test_the_whole_rehearsal_passes(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = lines(capsys, "--budget", "inf")
    assert code == 0, printed
    assert [line for line in printed if line.startswith("SKIP")] == [line for line in printed if " memory " in line]


def test_every_optimizer_of_ours_is_checked(tmp_path: Path) -> None:
    names = [name for name, _, _ in gpu_check.Checks(CPU, tmp_path).all()]
    optimizers = {name.removeprefix("optimizer-") for name in names if name.startswith("optimizer-")}
    assert optimizers == {*choices("optimizer")} - {"foreign"}
    assert len(names) == len({*names})


def test_the_peer_has_our_networks_parameters() -> None:
    run = gpu_check.run_of(gpu_check.TINY)
    network = gpu_check.NanoGPT(16, 1, 8, 16, run.size.vocab_size)
    assert sum(p.numel() for p in network.parameters()) == run.cost.parameters


def test_a_checkpoint_that_loses_bits_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(training: gpu_check.Training) -> gpu_check.Training:
        return gpu_check.Training.of(gpu_check.TINY, CPU)

    monkeypatch.setattr(gpu_check.Training, "resumed", forgetful)
    code, printed = lines(capsys, "--only", "optimizer-lion")
    assert code == 1
    assert printed[0].startswith("FAIL optimizer-lion")
    assert "the steps after a checkpoint have other bits" in printed[0]


def test_a_check_that_no_longer_fits_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = lines(capsys, "--only", "optimizer-adamw", "--budget", "3")
    assert code == 0
    assert {line.split()[0] for line in printed[:-1]} == {"SKIP"}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
