"""The one exception whose text a newcomer reads instead of a traceback."""


class StepError(Exception):
    """A step failed for a known reason.

    Parameters
    ----------
    sentence : str
        One sentence: what failed and how to mend it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
