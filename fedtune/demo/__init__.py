"""The demo: three invented hospitals send notes to nine desks."""

from fedtune.demo.generate import write as write
from fedtune.demo.run import run_demo as run_demo
