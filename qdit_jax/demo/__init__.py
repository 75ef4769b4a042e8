"""The demonstration: every stage, run on the packaged model."""

from qdit_jax.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
