"""fedtune: fine-tune a language model across hospitals without moving a record.

`__all__` lists the names of the library; each is imported when it is first used."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fedtune.core.boot import cut_off, fix_products, limit_spinning

if TYPE_CHECKING:
    from fedtune.accounting.costs import Plan, SitePlan, plan
    from fedtune.audit import audit_study
    from fedtune.audit.attack import Attack, attack_run, attack_study
    from fedtune.audit.contracts import check as check_plugin
    from fedtune.core.bases.find import Base, find_base
    from fedtune.core.bases.find import list_known as list_bases
    from fedtune.core.config import (
        AcceptanceTable,
        BaseTable,
        ClippingTable,
        Columns,
        ConsentTable,
        CoordinatorTable,
        DataFile,
        EvaluationTable,
        LoraTable,
        ObjectiveTable,
        PolicyTable,
        PreconditionerTable,
        PrivacyTable,
        PrivateEvaluationTable,
        PublicTable,
        QuantisationTable,
        ScheduleTable,
        SelectionTable,
        Site,
        SiteData,
        SiteEvaluation,
        SiteTable,
        StartTable,
        StrategyTable,
        Study,
        StudyTable,
        TrainingTable,
        VaultTable,
        WireTable,
        load_site,
        load_study,
        save,
    )
    from fedtune.core.config.sheet import Sheet
    from fedtune.core.errors import (
        BudgetExceeded,
        ConfigError,
        DataError,
        FedtuneError,
        InfrastructureError,
        InputError,
        ModelError,
        NotGenuine,
        PolicyRefused,
        Refused,
    )
    from fedtune.core.ledger.audit_log import verify as verify_log
    from fedtune.core.ledger.ledger import Ledger
    from fedtune.core.progress import OnEvent
    from fedtune.demo import run_demo
    from fedtune.derive.distill import distill
    from fedtune.derive.export import export
    from fedtune.derive.improve import improve
    from fedtune.derive.label import label
    from fedtune.derive.merge import merge_runs as merge
    from fedtune.derive.merge_exported import merge_models
    from fedtune.derive.settings import DistillSettings, LabelSettings, RlooSettings
    from fedtune.evaluation.answers import answers
    from fedtune.evaluation.compare_bases import Fit, choose_base
    from fedtune.evaluation.generate import generate
    from fedtune.evaluation.predict import predict
    from fedtune.evaluation.predictions import Predictions
    from fedtune.evaluation.run import evaluate
    from fedtune.evidence.dossier.release import approve, release
    from fedtune.evidence.verify import Verified
    from fedtune.evidence.verify import verify as verify_run
    from fedtune.launch.simulate import simulate
    from fedtune.launch.tune import Search, Trial, tune
    from fedtune.observe.status import read_status as status
    from fedtune.officer.acceptance.accept import Acceptance, accept
    from fedtune.officer.attack import SiteAttack, attack_site
    from fedtune.officer.data_report import DataReport, data_report
    from fedtune.officer.data_scan import DataScan, data_scan
    from fedtune.officer.personalise.personalise import Personal, personalise
    from fedtune.officer.purge import listing as purgeable
    from fedtune.officer.purge import purge
    from fedtune.officer.review import review
    from fedtune.officer.sheet import Described, describe_data
    from fedtune.officer.site_files import load_sites
    from fedtune.officer.withdraw import withdraw
    from fedtune.presets.templates import init
    from fedtune.runs.run import Run
    from fedtune.runs.verify_model import verify as verify_model
    from fedtune.server.versions import Versions

__version__ = "0.1.0"

cut_off()
fix_products()
limit_spinning()

# The optional library bitsandbytes warns needlessly: at its first import that a hub's code is
# missing, and for each int8 layer that it rounds the numbers, although a plan asked for this.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Module -> the public names that come from it; "name=other" if the module itself calls it `other`.
_MODULES = {
    "fedtune.audit": "audit_study",
    "fedtune.audit.attack": "Attack attack_run attack_study",
    "fedtune.audit.contracts": "check_plugin=check",
    "fedtune.core.bases.find": "Base find_base list_bases=list_known",
    "fedtune.officer.acceptance.accept": "Acceptance accept",
    "fedtune.officer.attack": "SiteAttack attack_site",
    "fedtune.officer.data_report": "DataReport data_report",
    "fedtune.officer.data_scan": "DataScan data_scan",
    "fedtune.officer.personalise.personalise": "Personal personalise",
    "fedtune.officer.purge": "purgeable=listing purge",
    "fedtune.officer.review": "review",
    "fedtune.officer.sheet": "Described describe_data",
    "fedtune.officer.site_files": "load_sites",
    "fedtune.officer.withdraw": "withdraw",
    "fedtune.core.config": (
        "AcceptanceTable BaseTable ClippingTable Columns ConsentTable CoordinatorTable DataFile "
        "EvaluationTable LoraTable ObjectiveTable PolicyTable PreconditionerTable PrivacyTable "
        "PrivateEvaluationTable PublicTable QuantisationTable ScheduleTable "
        "SelectionTable Site SiteData SiteEvaluation SiteTable StartTable StrategyTable Study "
        "StudyTable TrainingTable VaultTable WireTable load_site load_study save"
    ),
    "fedtune.core.config.sheet": "Sheet",
    "fedtune.presets.templates": "init",
    "fedtune.demo": "run_demo",
    "fedtune.derive.distill": "distill",
    "fedtune.derive.export": "export",
    "fedtune.derive.improve": "improve",
    "fedtune.derive.label": "label",
    "fedtune.derive.merge": "merge=merge_runs",
    "fedtune.derive.merge_exported": "merge_models",
    "fedtune.derive.settings": "DistillSettings LabelSettings RlooSettings",
    "fedtune.accounting.costs": "Plan SitePlan plan",
    "fedtune.core.errors": (
        "BudgetExceeded ConfigError DataError FedtuneError InfrastructureError InputError "
        "ModelError NotGenuine PolicyRefused Refused"
    ),
    "fedtune.evaluation.answers": "answers",
    "fedtune.evaluation.compare_bases": "Fit choose_base",
    "fedtune.evaluation.generate": "generate",
    "fedtune.evaluation.predict": "predict",
    "fedtune.evaluation.predictions": "Predictions",
    "fedtune.evaluation.run": "evaluate",
    "fedtune.evidence.dossier.release": "approve release",
    "fedtune.core.ledger.audit_log": "verify_log=verify",
    "fedtune.evidence.verify": "Verified verify_run=verify",
    "fedtune.launch.simulate": "simulate",
    "fedtune.launch.tune": "Search Trial tune",
    "fedtune.core.ledger.ledger": "Ledger",
    "fedtune.runs.verify_model": "verify_model=verify",
    "fedtune.observe.status": "status=read_status",
    "fedtune.core.progress": "OnEvent",
    "fedtune.runs.run": "Run",
    "fedtune.server.versions": "Versions",
}
_ORIGINS = {
    name: (module, other or name)
    for module, names in _MODULES.items()
    for name, _, other in (entry.partition("=") for entry in names.split())
}

__all__ = [
    "Acceptance",
    "AcceptanceTable",
    "Attack",
    "Base",
    "BaseTable",
    "BudgetExceeded",
    "ClippingTable",
    "Columns",
    "ConfigError",
    "ConsentTable",
    "CoordinatorTable",
    "DataError",
    "DataFile",
    "DataReport",
    "DataScan",
    "Described",
    "DistillSettings",
    "EvaluationTable",
    "FedtuneError",
    "Fit",
    "InfrastructureError",
    "InputError",
    "LabelSettings",
    "Ledger",
    "LoraTable",
    "ModelError",
    "NotGenuine",
    "ObjectiveTable",
    "OnEvent",
    "Personal",
    "Plan",
    "PolicyRefused",
    "PolicyTable",
    "PreconditionerTable",
    "Predictions",
    "PrivacyTable",
    "PrivateEvaluationTable",
    "PublicTable",
    "QuantisationTable",
    "Refused",
    "RlooSettings",
    "Run",
    "ScheduleTable",
    "Search",
    "SelectionTable",
    "Sheet",
    "Site",
    "SiteAttack",
    "SiteData",
    "SiteEvaluation",
    "SitePlan",
    "SiteTable",
    "StartTable",
    "StrategyTable",
    "Study",
    "StudyTable",
    "TrainingTable",
    "Trial",
    "VaultTable",
    "Verified",
    "Versions",
    "WireTable",
    "__version__",
    "accept",
    "answers",
    "approve",
    "attack_run",
    "attack_site",
    "attack_study",
    "audit_study",
    "check_plugin",
    "choose_base",
    "data_report",
    "data_scan",
    "describe_data",
    "distill",
    "evaluate",
    "export",
    "find_base",
    "generate",
    "improve",
    "init",
    "label",
    "list_bases",
    "load_site",
    "load_sites",
    "load_study",
    "merge",
    "merge_models",
    "personalise",
    "plan",
    "predict",
    "purge",
    "purgeable",
    "release",
    "review",
    "run_demo",
    "save",
    "simulate",
    "status",
    "tune",
    "verify_log",
    "verify_model",
    "verify_run",
    "withdraw",
]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used, and return what it names. Errors:
    AttributeError for any other name."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ORIGINS[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
