"""The demo: three invented hospitals learn to send notes to eighteen desks."""

from fedtune.demo.generate import write as write
from fedtune.demo.run import run_demo as run_demo
