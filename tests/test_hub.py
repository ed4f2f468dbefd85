"""Sharing adapters, with the real client against a stand-in for the Hub on this machine."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Fault, running
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from peftrank import hub, store
from peftrank.base import load_base
from peftrank.card import adapter_card, card_license
from peftrank.errors import AdapterError, ConfigError
from peftrank.ranker import Ranker

REPO = "someone/news"
MISSING = "is no PeftRank adapter: README.md, readout.safetensors, peftrank.json missing"


@pytest.fixture(scope="module")
def stand_in():
    with running() as made:
        yield made
        close_session()


@pytest.fixture
def server(stand_in, tmp_path, monkeypatch):
    """The stand-in, set as this process's Hub, with an empty cache and a user who is logged in."""
    stand_in.forget()
    settings = {
        "ENDPOINT": stand_in.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", stand_in.url)  # what PEFT goes through
    monkeypatch.setenv("HF_TOKEN", stand_in.token)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between tries
    return stand_in


@pytest.fixture
def shared(place):
    """What is uploaded of news@0002, by name."""
    return hub.prepare(place / "adapters/news/0002", REPO, license="mit")


@pytest.fixture
def published(server, shared):
    """The stand-in with that adapter in REPO."""
    server.repo(REPO, shared)
    return server


@pytest.fixture
def ranker(workplace):
    """A ranker on the base that the adapters were made for."""
    return Ranker(load_base(str(workplace / "base"), quantization="none", device="cpu"))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def push(cli, *more):
    return cli("adapters", "push", "news@0002", REPO, "--license", "mit", *more)


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def changed(files, name, change):
    """The files with a key of one of them changed, and hashes that fit."""
    import hashlib

    values = json.loads(files[name])
    change(values)
    made = {**files, name: json.dumps(values).encode()}
    if name != "peftrank.json":
        data = made[name]
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        return changed(made, "peftrank.json", lambda v: v["files"].update({name: entry}))
    return made


def test_what_was_pushed_and_pulled_gives_the_same_scores(
    cli, place, server, ranker, make_slate, monkeypatch
):
    slates = [make_slate(seed=i, n_candidates=3 + i) for i in range(3)]
    ranker.load_adapter(place / "adapters/news/0002")
    expected = ranker.score(slates, domain="news")
    result = push(cli)
    assert result.code == 0
    commit = server.repos[REPO].branches["main"]
    assert result.out.strip() == f"{server.url}/{REPO}/commit/{commit}"
    assert set(server.repos[REPO].commits[commit]) == {*hub.NAMES, ".gitattributes"}

    result = cli("adapters", "pull", REPO, "--store", "fresh")
    assert result.code == 0
    assert result.out.startswith(f"saved and activated fresh/news/0001: commit {commit}, lora for")
    assert store.active(place / "fresh", "news") == "0001"
    ranker.load_adapter(place / "fresh/news/0001", domain="pulled")
    assert ranker.score(slates, domain="pulled") == expected
    assert ranker.load_adapter(f"{REPO}@{commit}", domain="direct") == "direct"
    assert ranker.score(slates, domain="direct") == expected
    go_offline(monkeypatch)
    ranker.load_adapter(REPO, domain="offline")
    assert ranker.score(slates, domain="offline") == expected


def test_plain_peft_loads_it_by_name_as_the_card_says(published, workplace, place):
    def weights(source):
        model = AutoModelForCausalLM.from_pretrained(workplace / "base")
        return PeftModel.from_pretrained(model, source).state_dict()

    assert PeftConfig.from_pretrained(REPO).base_model_name_or_path is None  # it was a local folder
    local, remote = weights(place / "adapters/news/0002"), weights(REPO)
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[name], tensor) for name, tensor in remote.items())
    assert any(tensor.any() for name, tensor in remote.items() if "lora_B" in name)


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(cli, place, server, caplog):
    caplog.set_level(logging.DEBUG)
    shown = push(cli), cli("adapters", "pull", REPO, "--store", "fresh")
    assert [result.code for result in shown] == [0, 0]
    stored = [headers for _, host, headers in server.requests if host == server.storage]
    assert stored
    assert all("authorization" not in headers for headers in stored)
    asked = [headers for _, host, headers in server.requests if host == server.url]
    assert all(headers["authorization"] == f"Bearer {server.token}" for headers in asked)

    echo = json.dumps({"error": f"not with {server.token}, Bearer {server.token}\x1b[2J"}).encode()
    server.faults.append(Fault("api/models", 403, body=echo))
    refused = cli("adapters", "pull", REPO, "--store", "fresh")
    assert refused.code == 2
    assert "not with ***" in refused.err
    assert "\x1b" not in refused.err
    output = "".join(result.out + result.err for result in (*shown, refused)) + caplog.text
    assert server.token not in output


def test_a_dry_run_lists_files_and_bytes_and_contacts_nothing(cli, place, server, shared):
    result = push(cli, "--dry-run")
    assert result.code == 0
    *lines, total = [line.split() for line in result.out.splitlines()]
    sizes = {name: int(size.replace(",", "")) for size, name in lines}
    assert sizes.keys() == shared.keys()
    assert int(total[0].replace(",", "")) == sum(sizes.values())
    assert sizes["adapter_model.safetensors"] == len(shared["adapter_model.safetensors"])
    assert server.requests == []


@pytest.mark.parametrize("options", [(), ("--license", "(c) me")])
def test_a_licence_is_required(cli, place, server, options):
    result = cli("adapters", "push", "news", REPO, *options)
    assert result.code == 2
    assert "--license apache-2.0" in result.err
    assert server.requests == []


def test_the_licence_of_a_card_is_kept(published, place):
    path = hub.pull(REPO, place / "fresh")
    again = hub.prepare(path, "other/name")
    assert card_license(again["README.md"].decode()) == "mit"


def test_nothing_of_this_machine_is_uploaded(published, workplace, place):
    path = hub.pull(REPO, place / "fresh")
    assert store.describe(path)["hub"]["repo"] == REPO
    again = hub.prepare(path, "other/name")
    files = {**published.repos[REPO].commits[published.repos[REPO].branches["main"]], **again}
    for name, data in files.items():
        assert str(workplace).encode() not in data, name
        assert str(place).encode() not in data, name
    assert "hub" not in json.loads(again["peftrank.json"])
    assert REPO.encode() not in again["README.md"]


def test_a_push_goes_to_a_private_repository_and_a_branch_if_asked_to(cli, place, server):
    assert push(cli, "--private", "--branch", "v2", "--message", "Second try").code == 0
    made = server.repos[REPO]
    assert made.private
    assert set(made.commits[made.branches["main"]]) == {".gitattributes"}
    assert set(hub.NAMES) <= set(made.commits[made.branches["v2"]])
    assert cli("adapters", "pull", f"{REPO}@v2", "--store", "fresh").code == 0
    result = cli("adapters", "pull", REPO, "--store", "fresh")
    assert "missing" in result.err


def test_a_private_push_does_not_go_to_a_public_repository(cli, place, server):
    made = server.repo(REPO)
    result = push(cli, "--private")
    assert result.code == 2
    assert f"{REPO} is public" in result.err
    assert len(made.commits) == 1


def test_a_push_leaves_a_repository_of_something_else_alone(cli, place, server):
    made = server.repo(REPO, {"model.safetensors": b"a model", "README.md": b"its card"})
    result = push(cli)
    assert result.code == 2
    assert "holds other files ('model.safetensors')" in result.err
    assert len(made.commits) == 2


FAULTS = {
    "unknown": (
        Fault("GET /api/models", 401),
        "the Hub does not know you.*hf auth login.*HF_TOKEN",
    ),
    "forbidden": (Fault("GET /api/models", 403), r"your token may not \(403\).*settings/tokens"),
    "gone": (Fault("GET /api/models", 404), "there is no http.*someone/news.*hf auth login"),
    "gated": (
        Fault("GET /api/models", 403, {"X-Error-Code": "GatedRepo"}),
        "someone/news is gated. Ask for access",
    ),
    "often": (
        Fault("GET /api/models", 429, {"Retry-After": "17"}),
        r"too many requests \(429\). Try again in 17 seconds",
    ),
    "too often": (
        Fault("GET /api/models", 429, {"RateLimit": '"api";r=0;t=55'}),
        r"too many requests \(429\). Try again in 55 seconds",
    ),
    "broken": (Fault("GET /api/models", 503), r"the Hub has a fault \(503\). Try again later"),
    "another site": (Fault("GET /api/models", 200, body=b"<html>"), "cannot read someone/news"),
    "broken files": (Fault("/resolve/", 502), r"the Hub has a fault \(502\)"),
    "broken storage": (Fault("/storage/", 500), r"the Hub has a fault \(500\)"),
    "cut": (Fault("/storage/", cut=100), "no complete answer from http"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_pulling_is_explained_and_leaves_the_store_as_it_was(
    cli, place, published, fault
):
    what, message = FAULTS[fault]
    published.faults.append(Fault(**vars(what)))
    if fault == "cut":  # and nothing more when the client asks for the rest
        published.faults.insert(0, Fault("GET /storage/", cut=0))
    before = tree(place / "adapters")
    result = cli("adapters", "pull", REPO)
    assert result.code == 2
    assert "Traceback" not in result.err
    with pytest.raises(AdapterError, match=message):
        hub.fetch(REPO)
    assert message.split(".*")[0].replace("\\", "") in result.err
    assert tree(place / "adapters") == before


def test_half_a_download_is_not_taken_for_a_whole_one(place, published, monkeypatch):
    fault = Fault("/storage/", 500)
    published.faults.append(fault)
    with pytest.raises(AdapterError):
        hub.fetch(REPO)
    go_offline(monkeypatch)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set"):
        hub.fetch(REPO)
    commit = published.repos[REPO].branches["main"]
    with pytest.raises(AdapterError):
        hub.fetch(f"{REPO}@{commit}")


def test_a_download_that_is_cut_off_once_goes_on_where_it_stopped(published, place, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)
    published.faults.append(Fault("GET /storage/", cut=100, times=1))
    hub.pull(REPO, place / "fresh")
    ranges = [headers.get("range") for *_, headers in published.requests]
    assert "bytes=100-" in ranges


def test_a_revision_that_does_not_exist_is_named(cli, place, published):
    result = cli("adapters", "pull", f"{REPO}@v9")
    assert result.code == 2
    assert f"{REPO} has no revision 'v9'" in result.err


def test_a_hub_that_is_not_there_is_an_error(cli, place, published, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = cli("adapters", "pull", REPO)
    assert result.code == 2
    assert "no complete answer from http://127.0.0.1:9 (ConnectError)" in result.err
    assert "HF_HUB_OFFLINE=1 to use what was downloaded before" in result.err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("validate-yaml", 400, body=b'{"errors": [{"message": "no such licence"}]}'),
            "the Hub answered 400. The Hub says: no such licence",
        ),
        (Fault("/commit/", 403), "your token may not (403)"),
        (Fault("/preupload/", 429, {"Retry-After": "3"}), "Try again in 3 seconds"),
        (Fault("PUT /storage/", 403), "may not (403)"),
        (Fault("POST .*/commit/", 500), "the Hub has a fault (500)"),
        (Fault("POST .*/commit/", 412), "was changed meanwhile"),
    ],
)
def test_a_fault_while_pushing_is_explained_and_commits_nothing(cli, place, server, fault, message):
    made = server.repo(REPO)
    server.faults.append(fault)
    result = push(cli)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert len(made.commits) == 1


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_push_without_a_good_token_says_how_to_log_in(cli, place, server, monkeypatch, token):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place / "no-token"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    result = push(cli)
    assert result.code == 2
    assert "hf auth login" in result.err
    assert server.repos == {}


def test_a_push_to_another_s_name_is_explained(cli, place, server):
    server.faults.append(Fault("POST /api/repos/create", 403))
    result = push(cli)
    assert result.code == 2
    assert f"cannot write to {REPO}: your token may not (403)" in result.err


def test_offline_a_push_says_so(cli, place, server, monkeypatch):
    go_offline(monkeypatch)
    result = push(cli)
    assert result.code == 2
    assert "HF_HUB_OFFLINE is set" in result.err
    assert server.requests == []


def test_another_repository_is_no_adapter_and_the_message_says_what_is_missing(cli, place, server):
    server.repo(REPO, {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    result = cli("adapters", "pull", REPO)
    assert result.code == 2
    assert MISSING in result.err
    assert server.asked("/resolve/") == []


def code_readout(values):
    values["readout"]["name"] = "outside.module:Readout"


def control_characters(values):
    values["base"]["name"] = "base\x1b[31m"


def other_rank(values):
    values["r"] = 3


def other_format(values):
    values["format_version"] = 99


REFUSED = {
    "a pickle": (lambda f: {**f, "adapter_model.bin": b"x"}, "unexpected 'adapter_model.bin'"),
    "code": (lambda f: {**f, "hook.py": b"x"}, "unexpected 'hook.py'"),
    "a folder": (lambda f: {**f, "more/peftrank.json": b"{}"}, "unexpected 'more/peftrank.json'"),
    "a path out": (lambda f: {**f, "../../out.json": b"{}"}, r"unexpected '../../out.json'"),
    "much text": (lambda f: {**f, "README.md": b"x" * 10_500_000}, r"README.md has 10,500,000 b"),
    "another hash": (
        lambda f: {**f, "README.md": f["README.md"][:-1] + b"!"},
        "README.md was changed or damaged: SHA-256",
    ),
    "no tensors": (
        lambda f: {**f, "readout.safetensors": b"not safetensors"},
        "readout.safetensors has 15 bytes; peftrank.json says",
    ),
    "another shape": (
        lambda f: changed(f, "adapter_config.json", other_rank),
        r"lora_A .* expected .* with r=3",
    ),
    "a newer format": (
        lambda f: changed(f, "peftrank.json", other_format),
        "format_version is 99.*pip install -U peftrank",
    ),
    "outside code": (
        lambda f: changed(f, "peftrank.json", code_readout),
        "its readout is 'outside.module:Readout', code outside PeftRank.*--allow-code",
    ),
    "control characters": (
        lambda f: changed(f, "peftrank.json", control_characters),
        r"base.name holds control characters: 'base\\x1b",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_sound_adapter_is_refused_with_the_reason(
    cli, place, server, shared, what, tmp_path
):
    change, message = REFUSED[what]
    server.repo(REPO, change(shared))
    before = tree(place / "adapters")
    with pytest.raises(AdapterError, match=message) as caught:
        hub.fetch(REPO)
    assert f"{REPO}@{server.repos[REPO].branches['main'][:12]}" in str(caught.value)
    assert cli("adapters", "pull", REPO).code == 2
    assert tree(place / "adapters") == before
    assert list(tmp_path.rglob("out.json")) == []
    if "unexpected" in message:
        assert server.asked("/resolve/") == []  # refused before any of it is downloaded


def test_outside_code_is_accepted_where_it_is_allowed(server, shared, place, ranker):
    server.repo(REPO, changed(shared, "peftrank.json", code_readout))
    assert hub.pull(REPO, place / "fresh", allow_code=True).name == "0001"
    with pytest.raises(AdapterError, match="allow_code=True"):
        ranker.load_adapter(REPO)


def test_what_is_too_large_is_refused_before_the_download(cli, place, published, shared):
    total = sum(map(len, shared.values()))
    result = cli("adapters", "pull", REPO, "--store", "fresh", "--max-bytes", total - 1)
    assert result.code == 2
    assert f"has {total:,} bytes, more than the limit of {total - 1:,}" in result.err
    published.listed_sizes["adapter_model.safetensors"] = 2**30
    with pytest.raises(AdapterError, match=r"more than the limit of 1,073,741,824"):
        hub.fetch(REPO)
    published.listed_sizes["adapter_model.safetensors"] = None
    with pytest.raises(AdapterError, match=r"does not say how large adapter_model.safetensors"):
        hub.fetch(REPO)
    assert published.asked("/resolve/") == []
    published.listed_sizes.clear()
    assert hub.fetch(REPO, max_bytes=total).repo == REPO
    with pytest.raises(AdapterError, match="more than the limit"):  # nor from the cache
        hub.fetch(REPO, max_bytes=total - 1)


def test_a_link_out_of_the_cache_is_refused(published, place, monkeypatch):
    commit = hub.fetch(REPO).commit
    snapshot = Path(constants.HF_HUB_CACHE) / "models--someone--news/snapshots" / commit
    secret = place / "secret.txt"
    shutil.copyfile(snapshot / "README.md", secret)  # so that the hash would fit
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(secret)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(AdapterError, match="a link that leads out of the Hub's cache"):
            hub.pull(REPO, place / "fresh")
    assert not (place / "fresh").exists()


def test_a_damaged_cache_is_noticed_and_the_message_names_it(published, place):
    commit = hub.fetch(REPO).commit
    cached = Path(constants.HF_HUB_CACHE) / "models--someone--news"
    file = cached / "snapshots" / commit / "adapter_model.safetensors"
    file.resolve().write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(AdapterError, match=f"adapter_model.safetensors was changed.*{cached}"):
        hub.fetch(REPO)
    shutil.rmtree(cached)
    assert hub.fetch(REPO).commit == commit


def test_an_adapter_of_another_base_is_refused(published, workplace, place):
    other = Ranker(load_base(str(workplace / "other-base"), quantization="none", device="cpu"))
    with pytest.raises(AdapterError, match=r"was trained on base 'base' \(fingerprint"):
        other.load_adapter(REPO)
    assert other.domains == ()


def test_it_does_not_replace_an_active_adapter_of_another_base(cli, place, server, shared):
    def rebase(values):
        values["base"] |= {"name": "elsewhere", "fingerprint": "f" * 64}

    server.repo(REPO, changed(shared, "peftrank.json", rebase))
    before = tree(place / "adapters")
    result = cli("adapters", "pull", REPO)
    assert result.code == 2
    assert f"was trained on base 'elsewhere' (fingerprint {'f' * 12})" in result.err
    assert tree(place / "adapters") == before
    assert cli("adapters", "pull", REPO, "--no-activate").code == 0
    assert store.active(place / "adapters", "news") == "0002"
    assert cli("adapters", "pull", REPO, "--domain", "headlines").code == 0
    assert store.active(place / "adapters", "headlines") == "0001"
    assert store.describe(place / "adapters/headlines/0001")["domain"] == "headlines"


def test_a_branch_that_moves_meanwhile_is_pinned_to_where_it_was(
    published, shared, place, monkeypatch
):
    repo = published.repos[REPO]
    first = repo.branches["main"]

    def move():
        published.after_info = None
        repo.commit({**shared, "adapter_model.bin": b"a pickle"})

    published.after_info = move
    path = hub.pull(REPO, place / "fresh")
    assert store.describe(path)["hub"] == {"repo": REPO, "commit": first}
    assert repo.branches["main"] != first
    go_offline(monkeypatch)
    assert hub.fetch(REPO).commit == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(AdapterError, match=r"unexpected 'adapter_model\.bin'"):
        hub.fetch(REPO)
    assert hub.fetch(f"{REPO}@{first}").commit == first


def test_offline_only_the_cache_is_used(published, place, monkeypatch, cli):
    go_offline(monkeypatch)
    result = cli("adapters", "pull", REPO)
    assert result.code == 2
    assert "not in the Hub's cache" in result.err
    assert published.requests == []


@pytest.mark.parametrize("name", ["news", "a/b/c", "a/b@../../x", "../b", "a/b@", "a b/c"])
def test_what_cannot_be_a_name_on_the_hub_is_refused(cli, place, name):
    with pytest.raises(ConfigError, match="USER/REPO"):
        hub.fetch(name)
    assert cli("adapters", "push", "news", name.replace("a/b@", "a/b@v"), "--dry-run").code == 2


def manifest(**changes):
    return {
        "domain": "news",
        "method": {"name": "lora", "options": {"r": 4}},
        "prompt": {"mode": "isolated"},
        "readout": {"name": "score_head", "options": {}, "feature_names": []},
        "base": {
            "name": "smollm2-135m",
            "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "fingerprint": "ab" * 32,
            "architecture": "llama",
        },
        "metrics": {"ndcg@10": 0.51, "steps": 3},
        "data": {"fingerprint": "cd" * 32, "counts": {"train": 2}},
        "versions": {"torch": "2.13.0"},
        **changes,
    }


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_hub_reads_and_how_to_load_the_adapter():
    card = adapter_card(
        manifest(), license="apache-2.0", source=REPO, peft_config={"r": 4, "lora_alpha": 8}
    )
    values = front(card)
    assert values["library_name"] == "peft"
    assert values["license"] == card_license(card) == "apache-2.0"
    assert values["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"peftrank", "lora", "news", "listwise-recommendation"} <= set(values["tags"])
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "ndcg@10", "value": 0.51}]
    assert f"ranker.load_adapter('{REPO}')" in card
    assert f"PeftModel.from_pretrained(base, '{REPO}')" in card
    assert "| rank | 4 |" in card
    assert "| counts\\.train | 2 |" in card


def test_a_metric_s_interval_is_on_the_card():
    card = adapter_card(manifest(metrics={"mrr": {"mean": 0.5, "low": 0.4, "high": 0.6}}))
    (metric,) = front(card)["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "mrr", "value": 0.5, "name": "mrr, interval 0.4000 to 0.6000"}
    assert "| mrr | 0.5000 \\(0.4000 to 0.6000\\) |" in card


def test_text_among_the_data_is_not_on_the_card():
    card = adapter_card(manifest(data={"counts": {"train": 2}, "first": "Jane bought a ring"}))
    assert "Jane" not in card


def test_a_manifest_cannot_write_markdown_or_front_matter():
    evil = "x\n---\nlicense: mit\n# <script>alert(1)</script> [a](http://evil.example) ``` | `|`"
    base = {**manifest()["base"], "name": evil, "model_id": evil}
    card = adapter_card(
        manifest(
            domain=evil,
            base=base,
            method={"name": evil, "options": {evil: evil}},
            readout={"name": evil, "options": {}, "feature_names": [evil]},
            metrics={evil: 0.5},
            versions={evil: evil},
        ),
        license="mit",
    )
    assert list(front(card)) == ["library_name", "tags", "license", "model-index"]
    assert card.count("\n---\n") == 1
    body = card.split("\n---\n")[1]
    assert body.count("\n# ") == 1
    assert body.count("```") == 4
    outside = "".join(body.split("```")[::2])
    spans = outside.split("`")[::2]
    for text in spans:
        assert "<script" not in text.replace("\\<", "")
        assert "[a](" not in text
        assert "http:" not in text
    assert len(outside.split("`")) % 2 == 1


@pytest.mark.parametrize(
    "card", ["", "# No front", "---\n- a\n---\n", "---\n{\n---\n", "---\nx: 1\n"]
)
def test_a_card_without_a_licence_names_none(card):
    assert card_license(card) is None
