"""EVA in two real processes: both start at what the first one found, and train as one would."""

import subprocess
import sys
from pathlib import Path

import torch
import toys

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import lightning as L, torch, toys
from lightning_lora import LoRA

class Synced(toys.Toy):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, sync_dist=True)
        assert self.all_gather(loss.detach()).shape == (2,)
        return loss

class Peek(L.Callback):
    def on_train_start(self, trainer, pl_module):
        torch.save(toys.snapshot(pl_module), os.path.join({path!r}, f"start-{{trainer.global_rank}}.pt"))

torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # the order of the rows differs between ranks
lora = LoRA(r=2, init_lora_weights="eva", merge=None, summary=False)
trainer = toys.trainer({path!r}, [lora, Peek()], devices=2, strategy="ddp", max_epochs=1)
model = Synced(dropout=0.0)
trainer.fit(model, toys.loader(shuffle=True, batch_size=4))
torch.save(model.state_dict(), os.path.join({path!r}, f"end-{{trainer.global_rank}}.pt"))
"""


def test_all_processes_start_at_what_the_first_one_found(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), path=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for when in ("start", "end"):
        toys.assert_same_tensors(*(torch.load(tmp_path / f"{when}-{rank}.pt") for rank in range(2)))
    start = torch.load(tmp_path / "start-0.pt")["net.0.lora.default.lora_A"]
    torch.testing.assert_close(start @ start.T, torch.eye(2), rtol=0, atol=1e-5)
