"""The allocation: which group size (and bits) every layer gets under a budget."""

from qdit_jax.allocation.assigned import ChosenAct, assigned_params
from qdit_jax.allocation.budget import Budget, Priced, parse_budget, reference_spec
from qdit_jax.allocation.choice_options import choice_options
from qdit_jax.allocation.choices import GROUP_SIZES, describe, resized
from qdit_jax.allocation.coordinates import Coordinates, coordinated_params
from qdit_jax.allocation.cost import (
    FLOAT32_MAC,
    BitOps,
    Bytes,
    CpuCost,
    HardwareCost,
    MeanGroup,
    cost_table,
    gpu_cost,
    named_costs,
    total_cost,
    tpu_cost,
)
from qdit_jax.allocation.descent import additive_solution, corrected, descend
from qdit_jax.allocation.evaluate import BadFitnessError, Evaluator
from qdit_jax.allocation.extra_work import ExtraWork, extra_work, run_time_spec
from qdit_jax.allocation.fitting import fitted_coordinates
from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.knapsack import Solution, lagrangian_front, pareto, solve
from qdit_jax.allocation.latency import Latency, LayerTime, choice_name
from qdit_jax.allocation.objectives import (
    FeatureDistance,
    FunctionObjective,
    PairedError,
    SampleFn,
    feature_distance,
    function_objective,
    paired_error,
)
from qdit_jax.allocation.problem import Found, Front, Problem, Strategy
from qdit_jax.allocation.records import Measured, Store
from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.rollouts import Rollout, frechet_objective, seeds
from qdit_jax.allocation.schedule_error import ScheduleError, schedule_error
from qdit_jax.allocation.searching import SearchResult, search
from qdit_jax.allocation.sensitivity import (
    Effects,
    Prediction,
    effects,
    prediction,
    rank_correlation,
)
from qdit_jax.allocation.space import (
    SearchLayer,
    Space,
    recipe_of,
    search_space,
    specs_of,
    uniform_assignment,
    uniform_sizes,
)
from qdit_jax.allocation.step_candidates import EXCHANGED
from qdit_jax.allocation.step_levels import as_level, level_named, level_text
from qdit_jax.allocation.steps import ChosenSteps, MeasuredSchedule, choose_steps
from qdit_jax.allocation.strategies import STRATEGIES, strategy_named
from qdit_jax.allocation.strategies.allocate import Allocate, AllocationSettings, allocate
from qdit_jax.allocation.strategies.cheapest import Cheapest, CheapestSettings, cheapest
from qdit_jax.allocation.strategies.evolution import EvolutionSettings, Evolve, evolve
from qdit_jax.allocation.strategies.nsga import offspring
from qdit_jax.allocation.strategies.random_draw import random_children
from qdit_jax.allocation.timestep_effects import measured_timestep_weights
from qdit_jax.allocation.within import Within

__all__ = [
    "EXCHANGED",
    "FLOAT32_MAC",
    "GROUP_SIZES",
    "STRATEGIES",
    "Allocate",
    "AllocationSettings",
    "BadFitnessError",
    "BitOps",
    "Budget",
    "Bytes",
    "Cheapest",
    "CheapestSettings",
    "ChosenAct",
    "ChosenSteps",
    "Coordinates",
    "CpuCost",
    "Effects",
    "Evaluator",
    "EvolutionSettings",
    "Evolve",
    "ExtraWork",
    "FeatureDistance",
    "Found",
    "Front",
    "FunctionObjective",
    "HardwareCost",
    "Journal",
    "Latency",
    "LayerTime",
    "MeanGroup",
    "Measured",
    "MeasuredSchedule",
    "PairedError",
    "Prediction",
    "Priced",
    "Problem",
    "Rollout",
    "Rollouts",
    "SampleFn",
    "ScheduleError",
    "SearchLayer",
    "SearchResult",
    "Solution",
    "Space",
    "Store",
    "Strategy",
    "Within",
    "additive_solution",
    "allocate",
    "as_level",
    "assigned_params",
    "cheapest",
    "choice_name",
    "choice_options",
    "choose_steps",
    "coordinated_params",
    "corrected",
    "cost_table",
    "descend",
    "describe",
    "effects",
    "evolve",
    "extra_work",
    "feature_distance",
    "fitted_coordinates",
    "frechet_objective",
    "function_objective",
    "gpu_cost",
    "lagrangian_front",
    "level_named",
    "level_text",
    "measured_timestep_weights",
    "named_costs",
    "offspring",
    "paired_error",
    "pareto",
    "parse_budget",
    "prediction",
    "random_children",
    "rank_correlation",
    "recipe_of",
    "reference_spec",
    "resized",
    "run_time_spec",
    "schedule_error",
    "search",
    "search_space",
    "seeds",
    "solve",
    "specs_of",
    "strategy_named",
    "total_cost",
    "tpu_cost",
    "uniform_assignment",
    "uniform_sizes",
]
