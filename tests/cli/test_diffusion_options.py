"""What diffusion_options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

import argparse

from qzo.cli import diffusion_options, pictures
from qzo.cli.main import build_parser
from qzo.diffusion import objective


def test_choices_are_those_of_the_modules():
    assert diffusion_options.DENSITIES == objective.DENSITIES
    assert diffusion_options.WEIGHTINGS == objective.WEIGHTINGS


def test_defaults_are_those_of_the_modules():
    parser = argparse.ArgumentParser()
    diffusion_options.add_train_diffusion(parser)
    given = parser.parse_args(["p", "--data", "d", "--output-dir", "o"])
    law = objective.FlowLaw()
    assert (given.times, given.logit_mean, given.logit_std) == (law.density, law.mean, law.std)
    assert (given.draws, given.stratified) == (law.draws, law.stratified)
    assert (given.weighting, given.caption_dropout) == (law.weighting, law.dropout)


def test_help_tells_the_defaults_of_pictures(capsys):
    parser = build_parser()
    try:
        parser.parse_args(["generate", "--help"])
    except SystemExit:
        said = " ".join(capsys.readouterr().out.split())
    assert f"of a picture (default {pictures.STEPS})" in said
    assert f"of the prompt, 1: none (default {pictures.GUIDANCE})" in said
