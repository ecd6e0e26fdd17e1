"""Read Study (the public plan) and Site (never sent) from TOML. An unknown key is an error.

A study says what everybody may know. A site file says where the records are and what the site
allows. Only these of its values, which a person typed, leave the machine:

- `site.name` and `site.declared_size`; `site.lora_rank`, if the plan lets sites choose it
- whether data is `declared` public or generated, and whether a query or a view selects it
- the value of a rule of the policy, in a refusal by that rule
"""

from fedtune.core.config.held_out import PrivateEvaluationTable
from fedtune.core.config.load import load_site, load_study, study_from_json, validate_study
from fedtune.core.config.secure import SecureAggregationTable, noise_shares
from fedtune.core.config.site import (
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
from fedtune.core.config.start import PreconditionerTable, SelectionTable, StartTable
from fedtune.core.config.study import (
    BaseTable,
    ClippingTable,
    EvaluationTable,
    LoraTable,
    ObjectiveTable,
    PrivacyTable,
    PublicTable,
    QuantisationTable,
    ScheduleTable,
    StrategyTable,
    Study,
    StudyTable,
    WireTable,
)
from fedtune.core.config.training import TrainingTable
from fedtune.core.config.types import Columns, DataFile, Encoding, Table, format_duration
from fedtune.core.config.write import save

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
    "format_duration",
    "load_site",
    "load_study",
    "noise_shares",
    "save",
    "study_from_json",
    "validate_study",
]
