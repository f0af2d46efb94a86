"""Every choice trains on an accelerator without mixing devices, resumed or not, and its steps keep it busy."""

from __future__ import annotations

import json
from pathlib import Path

import accelerator
import chosen
from forked import CONTEXT

from mupsweep.sweep.config import choices

SMALL = [
    "experiment=smoke", "training.precision=fp32", "model.width=16", "model.depth=1", "model.context=32",
    "sweep.width_ratios=[1]", "sweep.log2_lrs=[-8]",
]  # fmt: skip
PARTS = {
    "blocks": ["optimizer=shampoo", "optimizer.block_size=8"],
    "grafting": ["optimizer=shampoo", "optimizer.graft=adamw"],
    "spectral norm": ["optimizer=soap", "optimizer.spectral_norm=true"],
    "no clipping": ["optimizer=muon", "training.clip=null"],
    "pieces": ["training.micro_batch=2"],
    "tied": ["model.tied=true"],
}
CASES = {
    **{f"optimizer={name}": chosen.words("optimizer", name) for name in choices("optimizer")},
    **{f"model={name}": chosen.words("model", name) for name in ("llama",)},
    **PARTS,
}
WAITS = {"optimizer=sso"}  # its bisection looks whether it is done
FAKE = {"optimizer=foreign"}  # of NAdam's state fake tensors cannot bring the product of its momenta back from a file


def test_a_step_on_an_accelerator_mixes_no_devices_and_waits_for_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    process = CONTEXT.Process(target=accelerator.steps, args=([[*SMALL, *case] for case in CASES.values()], report))
    process.start()
    process.join()
    wrong = {case: what for case, what in zip(CASES, json.loads(report.read_text()), strict=True) if what}
    assert {case for case, what in wrong.items() if what.startswith("waits for the device")} == WAITS
    assert {case for case, what in wrong.items() if "aten::empty_strided" in what} == FAKE
    assert wrong.keys() == WAITS | FAKE, wrong
