"""The whole road on the model inside the package."""

from qdit_jax.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
