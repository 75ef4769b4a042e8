"""The demonstration: every stage, run on the packaged model."""

from qdit_jax.demo.run import DemoSettings, convert_packaged, run_demo

__all__ = ["DemoSettings", "convert_packaged", "run_demo"]
