"""SAEs back from the Hub and from disk: by name, by path, and in the older form."""

import io
import json
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from published import NAME, REPO, Made, make_sae_directory
from running import Run
from synthetic import OLD_KEYS

from sae_core import list_pretrained, load_pretrained
from sae_core.publishing import hub
from sae_core.utils.errors import SAEError

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_load_pretrained(both: MiniHub, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.upload(made.folder, made.evaluation, REPO)
    newer = make_sae_directory(made.folder, seed=1)
    hub.upload(newer.folder, newer.evaluation, REPO)
    sae, history = load_pretrained(f"alice/saes/{NAME}", with_history=True)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(x), newer.sae(x).detach(), rtol=0, atol=0)
    assert history == {"epoch": [1, 2], "loss": [2.0, 1.0]}
    old = load_pretrained(f"alice/saes/{NAME}", revision=first.commit)
    torch.testing.assert_close(old.W_dec, made.sae.W_dec.detach(), rtol=0, atol=0)
    both.requests.clear()
    load_pretrained(f"alice/saes/{NAME}", revision=first.commit)
    assert not [r for r in both.requests if "resolve" in r.path or "_cdn" in r.path], "cached"
    assert list_pretrained("alice/saes") == [NAME]
    assert list_pretrained("alice/saes", revision=first.commit) == [NAME]


def test_an_sae_in_the_older_form_loads(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    weights = io.BytesIO()
    torch.save({name: made.sae.tensors()[name] for name in made.sae.weights._fields} |
               {"threshold": torch.tensor(0.4)}, weights)  # fmt: skip
    config = json.dumps(OLD_KEYS).encode()
    server.commit("alice/saes", {"old/weights.pt": weights.getvalue(), "old/config.json": config})
    assert list_pretrained("alice/saes") == [NAME, "old"]
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    old = load_pretrained("alice/saes/old")
    torch.testing.assert_close(old(x), made.sae(x).detach(), rtol=0, atol=0)
    with pytest.raises(SAEError, match="history.json: not a readable training history"):
        load_pretrained("alice/saes/old", with_history=True)


def test_the_package_brings_torch_only_when_it_is_needed(run: Run) -> None:
    code = "import sys, sae_core; print('torch' in sys.modules, sae_core.load_pretrained.__name__)"
    assert run("-c", code).stdout.split() == ["False", "load_pretrained"]


def test_load_pretrained_by_path_and_by_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("sae_core/pretrained_models", "results/saes"):
        folder = make_sae_directory(tmp_path / root / f"in_{root[:3]}").folder
        for name in (folder, folder.name):
            torch.testing.assert_close(load_pretrained(name).W_dec, made.sae.W_dec.detach())


@pytest.mark.parametrize("name", ["nothing", "alice/saes", "/nowhere/at/all"])
def test_what_is_no_name_of_an_sae(name: str) -> None:
    with pytest.raises(SAEError, match="no such SAE directory"):
        load_pretrained(name)


def test_what_the_hub_does_not_have(server: MiniHub, made: Made) -> None:
    hub.upload(made.folder, None, REPO)
    with pytest.raises(SAEError, match="alice/saes/other: no such folder"):
        load_pretrained("alice/saes/other")
    with pytest.raises(SAEError, match="alice/nothing/x: no such repository"):
        load_pretrained("alice/nothing/x")
    with pytest.raises(SAEError, match="alice/nothing: no such repository"):
        list_pretrained("alice/nothing")
