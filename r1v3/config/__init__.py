"""Configuration: YAML files checked against typed models, with `key=value` overrides.

Every stage has its own file and its own class here. Unknown keys are errors that name the key and
the nearest valid one. The resolved configuration is written into the run folder first.
"""

from r1v3.config.base import ConfigError, Section
from r1v3.config.curriculum import Curriculum, CurriculumStage, Range
from r1v3.config.data import Data, Search, Teacher
from r1v3.config.distill import (
    Choice,
    Distill,
    DistillTeacher,
    Duplicates,
    Endpoint,
    Filters,
    Scorer,
)
from r1v3.config.loading import load, to_yaml
from r1v3.config.sections import (
    DEFAULT_PICTURES,
    Architecture,
    Decoding,
    Modules,
    Monitor,
    Optimizer,
    Parallel,
    Pictures,
    Profile,
    Rewards,
    RolloutEngine,
)
from r1v3.config.serve import Serve
from r1v3.config.stages import (
    GRPO,
    SFT,
    Advantage,
    Connector,
    DynamicSampling,
    Evaluate,
    LengthStep,
    PolicyLoss,
    Select,
    Stage,
    Supervised,
)
from r1v3.config.study import (
    Comparison,
    RankCorrelation,
    Side,
    Study,
    StudyFigure,
    StudyStage,
)
from r1v3.config.suite import Judge, Suite
from r1v3.config.verbs import STAGES, modes_of

__all__ = [
    "DEFAULT_PICTURES",
    "GRPO",
    "SFT",
    "STAGES",
    "Advantage",
    "Architecture",
    "Choice",
    "ConfigError",
    "Comparison",
    "Connector",
    "Curriculum",
    "CurriculumStage",
    "Data",
    "Decoding",
    "Distill",
    "DistillTeacher",
    "Duplicates",
    "DynamicSampling",
    "Endpoint",
    "Evaluate",
    "Filters",
    "Judge",
    "LengthStep",
    "Modules",
    "Monitor",
    "Optimizer",
    "Parallel",
    "Pictures",
    "Profile",
    "PolicyLoss",
    "Range",
    "RankCorrelation",
    "Rewards",
    "RolloutEngine",
    "Scorer",
    "Search",
    "Section",
    "Select",
    "Serve",
    "Side",
    "Stage",
    "Study",
    "StudyFigure",
    "StudyStage",
    "Suite",
    "Supervised",
    "Teacher",
    "load",
    "modes_of",
    "to_yaml",
]
