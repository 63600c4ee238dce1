"""The configuration tree, whose sections can all be imported from here."""

from core.config.base import NATIVE_DTYPE, Attention, Dtype, Fraction, Lora, Model, Optim, Section, exact_div
from core.config.data import Data, Generation, Gold, Preferences, PreferenceSource, Splits, Vllm
from core.config.engine import ENGINE_STAGES, Engine, EngineOfStage, EngineStage
from core.config.ppo import Clip, Ensemble, ImportanceLevel, ImportanceMask, Kl, Ppo
from core.config.reward import Reward
from core.config.rm import RewardTraining, RewardVariant
from core.config.sft import Sft
from core.config.tree import BestOfN, Config, Evaluation, Run, Study

__all__ = [
    "Attention",
    "BestOfN",
    "Clip",
    "Config",
    "Data",
    "Dtype",
    "ENGINE_STAGES",
    "Engine",
    "EngineOfStage",
    "EngineStage",
    "Ensemble",
    "Evaluation",
    "Fraction",
    "Generation",
    "Gold",
    "ImportanceLevel",
    "ImportanceMask",
    "Kl",
    "Lora",
    "Model",
    "NATIVE_DTYPE",
    "Optim",
    "Ppo",
    "PreferenceSource",
    "Preferences",
    "Reward",
    "RewardTraining",
    "RewardVariant",
    "Run",
    "Section",
    "Sft",
    "Splits",
    "Study",
    "Vllm",
    "exact_div",
]
