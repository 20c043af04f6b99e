import torch

from rasengan import logs


def test_the_loss_of_each_sample_is_logged_by_its_name_beside_a_folder(accelerator, notes, tmp_path, monkeypatch):
    names = [str(tmp_path / "set" / name) for name in ("a.png", "sub/b.png")]
    losses = torch.tensor([0.5, 0.25])
    logs.log_each_loss(accelerator, names, losses, str(tmp_path / "set"), 3)
    monkeypatch.chdir(tmp_path)
    logs.log_each_loss(accelerator, names, losses, None, 4)
    assert notes.kept == [
        (3, {"loss_for_a.png": 0.5, "loss_for_sub/b.png": 0.25}),
        (4, {"loss_for_set/a.png": 0.5, "loss_for_set/sub/b.png": 0.25}),
    ]
