from __future__ import annotations

import pytest
import torch
from torch import nn

from fixify.heads import FixedClassifier, HeadSpec
from fixify.language.network import Dropouts, LanguageModel, WordClassifier


def model(**dropouts: float) -> LanguageModel:
    torch.manual_seed(0)
    layers = [nn.LSTM(8, 8) for _ in range(2)]
    return LanguageModel(nn.Embedding(20, 8), layers, nn.Linear(8, 20), dropouts=Dropouts(**dropouts))


def test_the_classifier_is_the_fixed_classifier_of_the_same_codes() -> None:
    reference = FixedClassifier(HeadSpec("hadamard", 16, 40), scale=3.0)
    own = WordClassifier(nn.Parameter(reference.codebook(), requires_grad=False), scale=3.0)
    features = torch.randn(5, 2, 16)
    with torch.no_grad():
        reference.bias.normal_()  # type: ignore[union-attr]
        own.bias.copy_(reference.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(own(features), reference(features), rtol=1e-5, atol=1e-5)


def test_the_correction_starts_as_nothing_and_is_of_low_rank() -> None:
    codes = nn.Parameter(torch.nn.functional.normalize(torch.randn(40, 16), dim=1), requires_grad=False)
    plain, more = WordClassifier(codes), WordClassifier(codes, rank=3)
    features = torch.randn(4, 16)
    torch.testing.assert_close(more(features), plain(features))
    learned = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (plain, more)]
    assert learned == [1 + 40, 1 + 40 + 3 * (40 + 16)]
    with torch.no_grad():
        more.up.normal_()  # type: ignore[union-attr]
        unit = torch.nn.functional.normalize(features, dim=1)
        whole = codes + more.up @ more.down  # type: ignore[operator]
        torch.testing.assert_close(more(features), more.scale * unit @ whole.T, rtol=1e-4, atol=1e-4)


def test_two_layers_are_torchs_two_layers() -> None:
    own = model()
    whole = nn.LSTM(8, 8, 2)
    for index, layer in enumerate(own.layers):
        for name, value in layer.state_dict().items():
            whole.state_dict()[name.replace("l0", f"l{index}")].copy_(value)
    words = torch.randint(0, 20, (7, 3))
    logits, state = own(words, own.start(3))
    raw, (hidden, cell) = whole(own.embedding(words))
    torch.testing.assert_close(logits, own.classifier(raw))
    torch.testing.assert_close(torch.cat([pair[0] for pair in state]), hidden)
    torch.testing.assert_close(torch.cat([pair[1] for pair in state]), cell)


def test_state_is_carried_on() -> None:
    own = model().eval()
    words = torch.randint(0, 20, (9, 2))
    whole, _ = own(words, own.start(2))
    first, state = own(words[:4], own.start(2))
    second, _ = own(words[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@pytest.mark.parametrize("name", Dropouts._fields)
def test_each_dropout_acts_in_training_alone(name: str) -> None:
    own = model(**{name: 0.5})
    words = torch.randint(0, 20, (6, 2))
    start = own.start(2)
    own.eval()
    torch.testing.assert_close(own(words, start)[0], model().eval()(words, start)[0])
    own.train()
    torch.manual_seed(1)
    assert not torch.allclose(own(words, start)[0], own(words, start)[0])


def test_dropped_features_are_the_same_at_every_step() -> None:
    own = model(output=0.5).train()
    output = own.features(torch.randint(0, 20, (6, 2)), own.start(2))
    gone = output.features == 0
    assert gone.any()
    assert not gone.all()
    assert (gone == gone[:1]).all()
    kept = output.features[~gone] / output.raw[~gone]
    torch.testing.assert_close(kept, torch.full_like(kept, 2.0))


def test_dropped_words_are_gone_everywhere_in_the_batch() -> None:
    own = model(words=0.5).train()
    words = torch.arange(20).repeat(2, 1).T.contiguous()
    embedded = own._embed(words)
    gone = (embedded == 0).all(dim=-1)
    assert gone.any()
    assert (gone[:, 0] == gone[:, 1]).all()
