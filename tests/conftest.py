from hypothesis import settings

# A busy machine is no bug: properties are judged by their answer, not by their time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
