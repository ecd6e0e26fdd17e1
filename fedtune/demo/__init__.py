"""The demo: three invented hospitals train a model that sends notes to the right one of eighteen
departments."""

from fedtune.demo.generate import write as write
from fedtune.demo.run import run_demo as run_demo
