"""The number of examples that hypothesis draws.

`pytest` draws the same examples every time; `pytest --hypothesis-profile long` draws twenty times as many, at random.
"""

from hypothesis import HealthCheck, Phase, settings

# The machine's speed is not tested.
timeless = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", timeless, max_examples=100, derandomize=True)
settings.register_profile("long", timeless, max_examples=2000)
# For mutants.py, which needs any failure and not the smallest example.
settings.register_profile("first", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("ci")


def examples(number: int):
    """Return settings that draw this many examples, or a multiple of it under the profile "long"."""
    return settings(max_examples=number * settings.default.max_examples // 100)
