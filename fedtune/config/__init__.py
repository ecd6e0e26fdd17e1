"""Study (the public plan) and Site (local, never sent), read from TOML. An unknown key is an error.

A study says what everybody may know. A site file says where the data lies and what the site allows;
nothing in it leaves the machine except `site.name`, `site.declared_size` and, where the plan lets
sites choose, `site.lora_rank`, which a person typed.
"""

from fedtune.config.load import checked, load_site, load_study, study_from_json
from fedtune.config.secure import SecureAggregationTable, noise_shares
from fedtune.config.site import (
    BASES,
    MODULES,
    RELEASE,
    AcceptanceTable,
    ConsentTable,
    CoordinatorTable,
    PolicyTable,
    Site,
    SiteData,
    SiteEvaluation,
    SiteTable,
    VaultTable,
)
from fedtune.config.sites import load_sites
from fedtune.config.start import PreconditionerTable, SelectionTable, StartTable
from fedtune.config.study import (
    BaseTable,
    ClippingTable,
    EvaluationTable,
    LoraTable,
    ObjectiveTable,
    PrivacyTable,
    PrivateEvaluationTable,
    PublicTable,
    QuantisationTable,
    ScheduleTable,
    StrategyTable,
    Study,
    StudyTable,
    WireTable,
)
from fedtune.config.training import TrainingTable
from fedtune.config.types import Columns, DataFile, Encoding, Table, format_duration
from fedtune.config.write import save

__all__ = [
    "BASES",
    "MODULES",
    "RELEASE",
    "AcceptanceTable",
    "BaseTable",
    "ClippingTable",
    "Columns",
    "ConsentTable",
    "CoordinatorTable",
    "DataFile",
    "Encoding",
    "EvaluationTable",
    "LoraTable",
    "ObjectiveTable",
    "PolicyTable",
    "PreconditionerTable",
    "PrivacyTable",
    "PrivateEvaluationTable",
    "PublicTable",
    "QuantisationTable",
    "ScheduleTable",
    "SecureAggregationTable",
    "SelectionTable",
    "Site",
    "SiteData",
    "SiteEvaluation",
    "SiteTable",
    "StartTable",
    "StrategyTable",
    "Study",
    "StudyTable",
    "Table",
    "TrainingTable",
    "VaultTable",
    "WireTable",
    "checked",
    "format_duration",
    "load_site",
    "load_sites",
    "load_study",
    "noise_shares",
    "save",
    "study_from_json",
]
