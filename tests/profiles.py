"""How many examples hypothesis draws.

`pytest` draws the same ones every time; `pytest --hypothesis-profile long` draws twenty times as many, at random.
"""

from hypothesis import Phase, settings

settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
# For mutants.py: the first failure will do, however large.
settings.register_profile("first", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("ci")


def examples(number: int):
    """Settings of a test that draws this many examples, or as many times more as the profile says."""
    return settings(max_examples=number * settings.default.max_examples // 100)
