"""An injected network in the training loops of others: Lightning and accelerate."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from se_inject import blocks, inject, load, param_groups, save
from tests import nets

X = (2, 3, 32, 32)


def make_original():
    torch.manual_seed(0)
    return nets.enliven(timm.create_model("resnet18", num_classes=10))


def make_data(batch_size):
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), batch_size=batch_size)


def make_optimizer(model):
    return torch.optim.SGD(param_groups(model, lr=0.01, se_lr=0.1), momentum=0.9)


def draw_weights(model):
    """Make a network that is surely another one than what will be loaded."""
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 0.2)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # of Lightning
def test_lightning_trains_and_its_checkpoint_is_read_again(tmp_path):
    import lightning.pytorch as pl

    class Classifier(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            images, labels = batch
            return nn.functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return make_optimizer(self.net)

    def fit(net, max_steps, checkpoint=None):
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(net), data, ckpt_path=checkpoint, weights_only=True)
        return trainer

    data, x, file = make_data(8), torch.randn(X), tmp_path / "two.ckpt"
    model = inject(make_original()).train()
    trainer = fit(model, 2)
    assert trainer.global_step == 2
    assert all(block.fc2.weight.any() for block in blocks(model).values())
    trainer.save_checkpoint(file)
    fresh = inject(make_original())
    Classifier.load_from_checkpoint(file, net=fresh, weights_only=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))

    resumed, onward = inject(make_original()).train(), inject(make_original()).train()
    assert fit(resumed, 4, checkpoint=file).global_step == 4
    fit(onward, 4)
    with torch.no_grad():
        assert torch.equal(resumed.eval()(x), onward.eval()(x))


@pytest.fixture
def accelerator(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
def test_accelerate_trains_and_its_state_is_read_again(accelerator, tmp_path):
    original = make_original()
    model = inject(original).train()
    wrapped, optimizer, data = accelerator.prepare(model, make_optimizer(model), make_data(4))
    for images, labels in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    assert loss.isfinite()
    assert all(block.fc2.weight.any() for block in blocks(wrapped).values())

    x = torch.randn(X)
    with torch.no_grad():
        expected = wrapped.eval()(x)
        accelerator.save_state(str(tmp_path / "state"))
        draw_weights(wrapped)
        assert not torch.equal(wrapped(x), expected)
        accelerator.load_state(str(tmp_path / "state"))
        assert torch.equal(wrapped(x), expected)

        unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        assert type(unwrapped) is type(original)
        save(unwrapped, tmp_path / "model.pt")
        assert torch.equal(load(tmp_path / "model.pt", base=make_original)(x), unwrapped(x))
