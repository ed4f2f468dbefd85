import errno
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
import torch

from peftrank import _folder, store
from peftrank.errors import AdapterError
from peftrank.peft_files import lora_layers

PATH = "base_model.model.model.layers.0.self_attn.q_proj"


def make_files(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PATH}.lora_A.weight": torch.randn(4, 8, generator=generator),
        f"{PATH}.lora_B.weight": torch.randn(8, 4, generator=generator),
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    manifest = {
        "peftrank_version": "0.1.0",
        "method": {"name": "lora", "options": {"r": 4}},
        "prompt": {"mode": "isolated"},
        "readout": {"name": "score_head", "options": {}, "feature_names": []},
        "base": {"name": "tiny", "fingerprint": "f" * 64, "tokenizer_hash": "t" * 64},
        "config": {"seed": seed},
        "metrics": {"ndcg@10": 0.5},
        "data": {"fingerprint": "d", "counts": {"train": 3}},
        "versions": {"torch": "2"},
    }
    files = {
        "peft_config": config,
        "tensors": tensors,
        "readout": {"text.weight": torch.randn(1, 8, generator=generator)},
        "manifest": manifest,
    }
    return store.AdapterFiles(**{**files, **changes})


@pytest.fixture
def saved(tmp_path):
    return store.save_adapter(tmp_path, "news", make_files(), card="# News\n")


def rewrite(path, name, data):
    """Replaces a file and makes the manifest agree, as an attacker or a careless tool would."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "peftrank.json").read_text())
    manifest["files"][name] = _folder._entry(data)
    (path / "peftrank.json").write_text(json.dumps(manifest))


def edit_manifest(path, **changes):
    manifest = json.loads((path / "peftrank.json").read_text())
    (path / "peftrank.json").write_text(json.dumps({**manifest, **changes}))


def test_an_adapter_comes_back_as_it_was_saved(saved):
    files, expected = store.load_adapter(saved), make_files()
    assert files.peft_config == expected.peft_config
    assert files.manifest["domain"] == "news"
    assert files.manifest["format_version"] == 1
    for got, want in ((files.tensors, expected.tensors), (files.readout, expected.readout)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_readout_without_parameters_comes_back_empty(tmp_path):
    path = store.save_adapter(tmp_path, "news", make_files(readout={}), card="")
    assert store.load_adapter(path).readout == {}


def test_bfloat16_and_shared_memory_survive(tmp_path):
    shared = torch.ones(4, 8, dtype=torch.bfloat16)
    tensors = {f"{PATH}.lora_A.weight": shared, f"{PATH}.lora_B.weight": shared.T}
    path = store.save_adapter(tmp_path, "news", make_files(tensors=tensors), card="")
    assert torch.equal(store.load_adapter(path).tensors[f"{PATH}.lora_B.weight"], shared.T)


def test_versions_count_up_and_the_newest_becomes_active(tmp_path):
    for seed in range(3):
        store.save_adapter(tmp_path, "news", make_files(seed), card="")
    assert store.versions(tmp_path, "news") == ("0001", "0002", "0003")
    assert store.active(tmp_path, "news") == "0003"
    assert store.domains(tmp_path) == ("news",)


def test_versions_sort_as_numbers(tmp_path):
    for version in ("0002", "9999", "10000"):
        (tmp_path / "news" / version).mkdir(parents=True)
    assert store.versions(tmp_path, "news") == ("0002", "9999", "10000")
    path = store.save_adapter(tmp_path, "news", make_files(), card="")
    assert path.name == "10001"


def test_an_older_version_can_be_put_back_into_use(tmp_path):
    for seed in range(2):
        store.save_adapter(tmp_path, "news", make_files(seed), card="")
    store.activate(tmp_path, "news", "0001")
    assert store.active(tmp_path, "news") == "0001"
    assert store.resolve("news", tmp_path).name == "0001"


def test_saving_without_activation_leaves_the_active_version(tmp_path):
    store.save_adapter(tmp_path, "news", make_files(), card="")
    store.save_adapter(tmp_path, "news", make_files(1), card="", activate=False)
    assert store.active(tmp_path, "news") == "0001"


def test_only_an_existing_version_can_be_activated(saved, tmp_path):
    with pytest.raises(AdapterError, match=r"no version '0007'.*0001"):
        store.activate(tmp_path, "news", "0007")
    with pytest.raises(AdapterError, match="no version"):
        store.activate(tmp_path, "news", "../news/0001")


def test_an_active_file_that_points_nowhere_is_an_error(saved, tmp_path):
    (tmp_path / "news" / "ACTIVE").write_text("../../etc")
    with pytest.raises(AdapterError, match="no version"):
        store.active(tmp_path, "news")


@pytest.mark.parametrize("domain", ["../news", "News", "a/b", "", "-x", "a" * 65, "0001"])
def test_a_domain_name_cannot_leave_the_store(tmp_path, domain):
    with pytest.raises(AdapterError, match="not a domain name"):
        store.save_adapter(tmp_path / "store", domain, make_files(), card="")
    assert not (tmp_path / "store").exists()


def test_resolve_takes_a_domain_a_version_and_a_folder(tmp_path):
    first = store.save_adapter(tmp_path, "news", make_files(), card="")
    second = store.save_adapter(tmp_path, "news", make_files(1), card="")
    assert store.resolve("news", tmp_path) == second
    assert store.resolve("news@0001", tmp_path) == first
    assert store.resolve(first, tmp_path / "other") == first
    assert store.resolve(str(first), tmp_path / "other") == first


def test_resolve_says_which_domains_there_are(saved, tmp_path):
    with pytest.raises(AdapterError, match="did you mean 'news'"):
        store.resolve("new", tmp_path)
    with pytest.raises(AdapterError, match="no version '0009'"):
        store.resolve("news@0009", tmp_path)


def test_resolve_refuses_a_domain_without_active_version(tmp_path):
    store.save_adapter(tmp_path, "news", make_files(), card="", activate=False)
    with pytest.raises(AdapterError, match=r"is active.*0001"):
        store.resolve("news", tmp_path)


def test_a_truncated_file_is_refused(saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="bytes"):
        store.load_adapter(saved)


@pytest.mark.parametrize("name", _folder.HASHED)
def test_one_flipped_byte_is_refused(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[-1] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(AdapterError, match="changed or damaged"):
        store.load_adapter(saved)


@pytest.mark.parametrize("name", [*_folder.HASHED, _folder.MANIFEST])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(AdapterError, match=name):
        store.verify(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.PKL", "setup.py"])
def test_a_file_that_could_run_code_is_refused_with_the_reason(saved, name):
    (saved / name).write_bytes(b"x")
    with pytest.raises(AdapterError, match="run code"):
        store.load_adapter(saved)


def test_any_other_file_or_folder_is_refused(saved):
    (saved / "notes.txt").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"unexpected file 'notes\.txt'"):
        store.load_adapter(saved)
    (saved / "notes.txt").unlink()
    (saved / "sub").mkdir()
    with pytest.raises(AdapterError, match="no regular file"):
        store.load_adapter(saved)


def test_a_link_is_refused_even_to_the_right_content(saved, tmp_path):
    target = tmp_path / "elsewhere"
    (saved / "README.md").rename(target)
    (saved / "README.md").symlink_to(target)
    with pytest.raises(AdapterError, match="links"):
        store.load_adapter(saved)


def test_an_active_file_that_is_a_link_or_endless_is_refused(saved, tmp_path):
    active = tmp_path / "news" / "ACTIVE"
    active.unlink()
    active.symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match="ACTIVE is no regular file"):
        store.active(tmp_path, "news")
    active.unlink()
    active.touch()
    os.truncate(active, 2**40)
    with pytest.raises(AdapterError, match="no version"):
        store.active(tmp_path, "news")


@pytest.mark.parametrize("name", [*_folder.HASHED, _folder.MANIFEST])
def test_an_oversized_file_is_refused_before_it_is_read(saved, name):
    os.truncate(saved / name, 2**42)
    with pytest.raises(AdapterError, match=f"{name} has {2**42} bytes"):
        store.load_adapter(saved)


def test_a_listed_but_oversized_text_is_refused_before_it_is_read(saved):
    manifest = json.loads((saved / "peftrank.json").read_text())
    manifest["files"]["README.md"]["bytes"] = 2**42
    edit_manifest(saved, files=manifest["files"])
    os.truncate(saved / "README.md", 2**42)
    with pytest.raises(AdapterError, match="at most 16777216 are read"):
        store.load_adapter(saved)


def test_a_name_longer_than_names_may_be_is_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match="neither a folder nor a domain"):
        store.resolve("a" * 300, tmp_path)


def test_a_linked_version_folder_is_not_a_version(saved, tmp_path):
    (tmp_path / "news" / "0002").symlink_to(saved)
    assert store.versions(tmp_path, "news") == ("0001",)


def test_a_plain_peft_adapter_is_refused_with_the_reason(saved):
    (saved / "peftrank.json").unlink()
    with pytest.raises(AdapterError, match="plain PEFT adapter"):
        store.load_adapter(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "readout.safetensors"])
def test_nan_and_infinite_weights_are_refused(saved, name, value):
    files = store.load_adapter(saved)
    tensors = files.readout if name.startswith("readout") else files.tensors
    next(iter(tensors.values())).view(-1)[0] = value
    rewrite(saved, name, _folder._serialize(tensors))
    with pytest.raises(AdapterError, match="NaN or infinite"):
        store.load_adapter(saved)


def test_nan_weights_are_not_published(tmp_path):
    bad = make_files(readout={"text.weight": torch.tensor([float("nan")])})
    with pytest.raises(AdapterError, match="NaN"):
        store.save_adapter(tmp_path, "news", bad, card="")
    assert list((tmp_path / "news").iterdir()) == []


def test_a_file_that_is_not_safetensors_is_refused(saved):
    rewrite(saved, "readout.safetensors", b"\xff" * 64)
    with pytest.raises(AdapterError, match="safetensors"):
        store.load_adapter(saved)


def test_weights_that_are_not_floating_point_are_refused(saved):
    rewrite(saved, "readout.safetensors", _folder._serialize({"x": torch.ones(2).long()}))
    with pytest.raises(AdapterError, match="not floating point"):
        store.load_adapter(saved)


def test_weights_without_adapter_are_refused(saved):
    rewrite(saved, "adapter_model.safetensors", _folder._serialize({}))
    with pytest.raises(AdapterError, match="no tensor"):
        store.load_adapter(saved)


def test_a_shape_that_contradicts_the_configuration_is_refused(saved):
    rewrite(saved, "adapter_config.json", b'{"peft_type": "LORA", "r": 5, "lora_alpha": 8}')
    with pytest.raises(AdapterError, match="r=5"):
        store.load_adapter(saved)


CONFIGS = {
    "a rank of 0": ({"r": 0}, "rank of .* is 0"),
    "a rank that is no number": ({"r": "4"}, "rank of .* is '4'"),
    "patterns that are no object": ({"rank_pattern": ["q"]}, "rank_pattern is .*an object"),
    "a pattern of too many": ({"alpha_pattern": {"a{99999999999}": 1}}, "no valid pattern"),
    "a pattern too deep": (
        {"rank_pattern": {"(" * 2000 + ")" * 2000: 4}},
        r"no valid pattern|take for ever",
    ),
    "an activation that is no name": (
        {"peft_type": "BOTTLENECK", "activation": [], "reads": "output", "scale": 1},
        r"activation=\[\]",
    ),
    "an alpha too large": ({"lora_alpha": 10**400}, "too large a number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_makes_no_sense_is_refused(saved, case):
    changes, message = CONFIGS[case]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
    rewrite(saved, "adapter_config.json", json.dumps(config).encode())
    with pytest.raises(AdapterError, match=message):
        store.load_adapter(saved)


def layers(count, name="model.layers.{}.self_attn.q_proj"):
    paths = [name.format(i) for i in range(count)]
    pairs = (("lora_A", torch.ones(4, 8)), ("lora_B", torch.ones(8, 4)))
    return paths, {f"base_model.model.{p}.{k}.weight": t for p in paths for k, t in pairs}


def test_a_rank_of_its_own_for_each_of_many_modules_is_read_quickly(saved):
    paths, tensors = layers(700)
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {re.escape(path): 4 for path in paths}}
    start = time.process_time()
    assert len(lora_layers(config, tensors)) == 700
    assert time.process_time() - start < 10


def test_many_patterns_that_take_long_on_many_modules_are_refused_at_once(saved):
    _, tensors = layers(700, "a" * 200 + "{}")
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {f"a*a*{i}!": 2 for i in range(50)}}
    with pytest.raises(AdapterError, match="50 patterns for 700 modules, which may take for ever"):
        lora_layers(config, tensors)


def test_an_infinite_number_is_refused(saved):
    rewrite(saved, "adapter_config.json", b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}')
    with pytest.raises(AdapterError, match=r"1e999 is too large a number"):
        store.load_adapter(saved)


def test_a_module_named_longer_than_any_is_refused(saved):
    path = "base_model.model." + "a" * 5000
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 8), f"{path}.lora_B.weight": torch.ones(8, 4)}
    rewrite(saved, "adapter_model.safetensors", _folder._serialize(tensors))
    with pytest.raises(AdapterError, match="a module of 5000 characters"):
        store.load_adapter(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_of_fewer_than_16_bits_or_complex_ones_are_refused(saved, dtype):
    rewrite(saved, "readout.safetensors", _folder._serialize({"x": torch.ones(2).to(dtype)}))
    with pytest.raises(AdapterError, match="not floating point as float32"):
        store.load_adapter(saved)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "ADALORA", None])
def test_another_method_is_refused(saved, kind):
    rewrite(saved, "adapter_config.json", json.dumps({"peft_type": kind}).encode())
    with pytest.raises(AdapterError, match="peft_type"):
        store.load_adapter(saved)


def test_a_bottleneck_with_wrong_shapes_is_refused(tmp_path):
    stem = "base_model.model.model.layers.0.mlp.bottleneck"
    good = {
        f"{stem}.down.weight": torch.ones(2, 8),
        f"{stem}.down.bias": torch.ones(2),
        f"{stem}.up.weight": torch.ones(8, 2),
        f"{stem}.up.bias": torch.ones(8),
    }
    config = {"peft_type": "BOTTLENECK", "reads": "output", "activation": "relu", "scale": 1.0}
    path = store.save_adapter(
        tmp_path, "video", make_files(tensors=good, peft_config=config), card=""
    )
    assert store.describe(path)["parameters"] == 42
    bad = {**good, f"{stem}.up.weight": torch.ones(2, 8)}
    with pytest.raises(AdapterError, match="shapes"):
        store.save_adapter(tmp_path, "video", make_files(tensors=bad, peft_config=config), card="")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"format_version": NaN}', '{"\\ud800": 1}', "[" * 100_000]
)
def test_a_manifest_that_is_no_json_object_is_refused(saved, text):
    (saved / "peftrank.json").write_text(text)
    with pytest.raises(AdapterError, match=r"peftrank\.json"):
        store.load_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "newer PeftRank"),
        ({"base": {}}, r"base\.name.*missing"),
        ({"readout": {"name": 3}}, r"readout\.name"),
        ({"readout": {"name": "a", "options": {}, "feature_names": [1]}}, "feature_names"),
        ({"files": {}}, "must list"),
        ({"method": {"name": "lora", "options": []}}, r"method\.options' is \[\]; expected dict"),
        ({"prompt": {"parts": []}}, r"'prompt\.parts'.*dictionary"),
        ({"prompt": {"parts": {"history": 3}}}, r"'prompt\.parts\.history'.*string"),
        ({"prompt": {"fields": "title"}}, r"'prompt\.fields'.*list"),
        ({"prompt": {"history_length": "20"}}, r"'prompt\.history_length'.*integer"),
        ({"prompt": {"max_tokens": -1}}, r"'prompt\.max_tokens'.*at least|greater"),
        ({"prompt": {"max_depth": {}}}, r"'prompt\.max_depth'.*integer"),
        ({"files": {name: {"sha256": 1} for name in _folder.HASHED}}, "sha256 and bytes"),
        ({"files": {**dict.fromkeys(_folder.HASHED), "../x": {}}}, "must list"),
    ],
)
def test_a_manifest_with_a_missing_or_wrong_key_is_refused(saved, changes, message):
    edit_manifest(saved, **changes)
    with pytest.raises(AdapterError, match=message):
        store.load_adapter(saved)


def test_an_incomplete_manifest_is_not_published(tmp_path):
    with pytest.raises(AdapterError, match=r"peftrank_version.*missing"):
        store.save_adapter(tmp_path, "news", make_files(manifest={}), card="")
    assert list((tmp_path / "news").iterdir()) == []


def test_a_manifest_with_nan_is_not_published(tmp_path):
    manifest = {**make_files().manifest, "metrics": {"auc": float("nan")}}
    with pytest.raises(AdapterError, match="JSON"):
        store.save_adapter(tmp_path, "news", make_files(manifest=manifest), card="")


def test_another_base_is_refused_naming_both(saved, tiny_decoder):
    manifest = store.load_adapter(saved).manifest
    with pytest.raises(AdapterError, match=r"'tiny'.*fingerprint.*'tiny-decoder'"):
        store.check_base(manifest, tiny_decoder.identity)


def test_another_tokenizer_is_refused_and_another_quantization_is_not(tiny_decoder):
    identity = tiny_decoder.identity
    base = {
        "name": "tiny",
        "fingerprint": identity.fingerprint,
        "tokenizer_hash": identity.tokenizer_hash,
        "quantization": "int8",
        "compute_dtype": "float16",
    }
    store.check_base({"domain": "news", "base": base}, identity)
    with pytest.raises(AdapterError, match="tokenizer_hash"):
        store.check_base({"domain": "news", "base": {**base, "tokenizer_hash": "x"}}, identity)


@pytest.mark.parametrize("failing", [*_folder.HASHED, _folder.MANIFEST])
def test_a_full_disk_leaves_nothing_behind(saved, tmp_path, monkeypatch, failing):
    write = Path.write_bytes

    def full(path, data):
        if path.name == failing:
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AdapterError, match="No space left"):
        store.save_adapter(tmp_path, "news", make_files(1), card="")
    assert sorted(p.name for p in (tmp_path / "news").iterdir()) == ["0001", "ACTIVE"]
    assert store.active(tmp_path, "news") == "0001"


def test_a_full_disk_at_activation_keeps_the_old_active_version(saved, tmp_path, monkeypatch):
    store.save_adapter(tmp_path, "news", make_files(1), card="", activate=False)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match=r"ACTIVE.*No space left"):
        store.activate(tmp_path, "news", "0002")
    assert store.active(tmp_path, "news") == "0001"


def test_a_store_that_is_a_file_gives_path_and_reason(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(AdapterError, match=r"store/news.*Not a directory"):
        store.save_adapter(tmp_path / "store", "news", make_files(), card="")


def test_leftovers_of_a_crash_are_no_versions_and_go_when_old(saved, tmp_path):
    new, old = tmp_path / "news" / ".tmp-new", tmp_path / "news" / ".tmp-old"
    for folder in (new, old):
        folder.mkdir()
        (folder / "README.md").write_text("")
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    assert store.versions(tmp_path, "news") == ("0001",)
    store.save_adapter(tmp_path, "news", make_files(), card="")
    assert new.exists()
    assert not old.exists()


def publish_many(folder, seed, count):
    for i in range(count):
        store.save_adapter(folder, "news", make_files(seed * 1000 + i), card="")


def test_processes_that_publish_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=publish_many, args=(tmp_path, s, 6)) for s in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    names = store.versions(tmp_path, "news")
    assert len(names) == 18
    seeds = {
        store.load_adapter(tmp_path / "news" / name).manifest["config"]["seed"] for name in names
    }
    assert seeds == {s * 1000 + i for s in range(3) for i in range(6)}
    assert store.active(tmp_path, "news") in names
    assert not list((tmp_path / "news").glob(".tmp-*"))


def test_describe_says_what_a_person_wants_to_know_as_json(saved):
    described = json.loads(json.dumps(store.describe(saved)))
    assert described["domain"] == "news"
    assert described["parameters"] == 64
    assert described["readout_parameters"] == 8
    assert described["metrics"] == {"ndcg@10": 0.5}


def test_diff_of_an_adapter_with_itself_is_empty(saved):
    found = store.diff(saved, saved)
    assert found["config"] == {}
    assert all(norms["difference"] == 0 for norms in found["modules"].values())


def test_diff_gives_the_norm_of_the_difference_of_the_updates(tmp_path):
    a, b = make_files(), make_files(1)
    b.peft_config["lora_alpha"] = 4
    paths = [store.save_adapter(tmp_path, "news", files, card="") for files in (a, b)]
    found = json.loads(json.dumps(store.diff(*paths)))
    assert found["config"]["adapter_config.lora_alpha"] == [8, 4]
    assert found["config"]["config.seed"] == [0, 1]

    def update(files, scale):
        return (
            scale * files.tensors[f"{PATH}.lora_B.weight"] @ files.tensors[f"{PATH}.lora_A.weight"]
        )

    expected = (update(a, 2.0) - update(b, 1.0)).norm().item()
    assert found["modules"]["model.layers.0.self_attn.q_proj"]["difference"] == pytest.approx(
        expected
    )
    assert "readout.text.weight" in found["modules"]


def test_diff_needs_no_memory_for_the_product_of_the_factors(tmp_path):
    # The update of 200 000 x 200 000 would take 160 GB.
    tensors = {
        f"{PATH}.lora_A.weight": torch.ones(1, 200_000),
        f"{PATH}.lora_B.weight": torch.ones(200_000, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    paths = [
        store.save_adapter(
            tmp_path, "news", make_files(tensors=tensors, peft_config=config | more), card=""
        )
        for more in ({}, {"lora_alpha": 3})
    ]
    norms = store.diff(*paths)["modules"]["model.layers.0.self_attn.q_proj"]
    assert norms == pytest.approx({"a": 400_000, "b": 600_000, "difference": 200_000})


def test_diff_of_different_ranks_and_modules_works(tmp_path):
    other = "base_model.model.model.layers.1.mlp.up_proj"
    tensors = {
        f"{PATH}.lora_A.weight": torch.ones(2, 8),
        f"{PATH}.lora_B.weight": torch.ones(8, 2),
        f"{other}.lora_A.weight": torch.ones(2, 8),
        f"{other}.lora_B.weight": torch.ones(16, 2),
    }
    b = make_files(tensors=tensors, peft_config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    paths = [store.save_adapter(tmp_path, "news", f, card="") for f in (make_files(), b)]
    modules = store.diff(*paths)["modules"]
    assert modules["model.layers.0.self_attn.q_proj"]["difference"] > 0
    assert modules["model.layers.1.mlp.up_proj"]["a"] is None
