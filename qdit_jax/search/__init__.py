"""The allocation: which group size (and bits) every layer gets under a budget."""

from qdit_jax.search.allocate import Allocation, AllocationSettings, allocate
from qdit_jax.search.assigned import ChosenAct, assigned_params
from qdit_jax.search.budget import Budget, parse_budget
from qdit_jax.search.cost import (
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
from qdit_jax.search.descent import additive_solution, corrected, descend
from qdit_jax.search.evaluate import (
    BadFitnessError,
    Evaluator,
    LostWorkerError,
    candidate_mesh,
)
from qdit_jax.search.evolution import EvolutionSettings, evolve, random_children
from qdit_jax.search.journal import Journal
from qdit_jax.search.knapsack import Solution, lagrangian_front, pareto, solve
from qdit_jax.search.nsga import offspring
from qdit_jax.search.objectives import (
    FeatureDistance,
    FunctionObjective,
    PairedError,
    SampleFn,
    feature_distance,
    function_objective,
    paired_error,
)
from qdit_jax.search.records import Measured, Store
from qdit_jax.search.sensitivity import Effects, Prediction, effects, prediction, rank_correlation
from qdit_jax.search.space import (
    GROUP_SIZES,
    SearchLayer,
    Space,
    assignment_of,
    recipe_of,
    search_space,
    specs_of,
    uniform_assignment,
    uniform_sizes,
)

__all__ = [
    "GROUP_SIZES",
    "Allocation",
    "AllocationSettings",
    "BadFitnessError",
    "BitOps",
    "Budget",
    "Bytes",
    "ChosenAct",
    "CpuCost",
    "Effects",
    "Evaluator",
    "EvolutionSettings",
    "FeatureDistance",
    "FunctionObjective",
    "HardwareCost",
    "Journal",
    "LostWorkerError",
    "MeanGroup",
    "Measured",
    "PairedError",
    "Prediction",
    "SampleFn",
    "SearchLayer",
    "Solution",
    "Space",
    "Store",
    "additive_solution",
    "allocate",
    "assigned_params",
    "assignment_of",
    "candidate_mesh",
    "corrected",
    "cost_table",
    "descend",
    "effects",
    "evolve",
    "feature_distance",
    "function_objective",
    "gpu_cost",
    "lagrangian_front",
    "named_costs",
    "offspring",
    "paired_error",
    "pareto",
    "parse_budget",
    "prediction",
    "random_children",
    "rank_correlation",
    "recipe_of",
    "search_space",
    "solve",
    "specs_of",
    "total_cost",
    "tpu_cost",
    "uniform_assignment",
    "uniform_sizes",
]
