"""Types for argparse: what a flag's value may be, so that a wrong one ends in one clear line."""

import argparse
import math


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low=None, above=None, high=None):
    """Return an argparse type: a finite int or float with low <= value <= high, above < value."""
    high = 2**63 - 1 if kind is int and high is None else high  # what PyTorch can count to

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no {'whole ' if kind is int else ''}number") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is more than {high}")
        return value
    return parse


def parse_epsilon(text):
    """Return the float that "0.1" or "8/255" says; argparse.ArgumentTypeError unless it lies in [0, 1]."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is no number such as 0.1 or 8/255") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in [0, 1], the range of a pixel")
    return value


def step_size(text):
    """Return the float above 0 that "0.01" or "0.8/255" says."""
    value = parse_epsilon(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a step of 0 does not move")
    return value


def history_key(value):
    """Return the name of an epsilon or a radius in the history: six digits."""
    return f"{value:.6g}"


def epsilon_label(key):
    """Return how an epsilon of the history is shown: "0.03" as it is, "0.0313725" as "8/255", halves as "0.5/255"."""
    levels = float(key) * 255
    halves = round(2 * levels)
    is_long = len(key) > len("0.005")
    return f"{halves / 2:g}/255" if is_long and abs(2 * levels - halves) < 2e-3 else key


def listed(parse):
    """Return an argparse type for one word that holds several values with commas between them."""
    return lambda text: [parse(part) for part in text.split(",")]


def count_or(*words):
    """Return an argparse type: one of the words, or a whole number above 0."""
    return lambda text: text if text in words else number(int, low=1)(text)
