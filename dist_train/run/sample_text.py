"""A hook that shows what a language model writes as it learns."""

from dist_train.errors import ConfigError
from dist_train.loop.evaluate import in_eval
from dist_train.models.generation import Sampling
from dist_train.run.hooks import Hook
from dist_train.run.running import Run
from dist_train.run.writing import Writer, context_of, uncompiled


class SampleText(Hook):
    """Prints a sample of a language model's text every so many steps, and at the end. It is of the averaged weights
    where an evaluation would be. Training is not changed by it, to the bit.

    Args:
        prompt: what the text goes on from; empty begins a document.
        every_steps: between two samples.
        tokens: of a sample.
        temperature: see Sampling; 0 always takes the most probable token.
        top_k: of so many most probable ones (null: all).
        top_p: of the fewest that are as probable as this together (1: all).
        seed: of what is drawn. All samples of a run have the same draws.

    Raises:
        ConfigError: the data set has no tokenizer, or the prompt is none for it.
    """

    def __init__(
        self, prompt: str = "", every_steps: int = 250, tokens: int = 200, temperature: float = 0.8,
        top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
    ):  # fmt: skip
        self.prompt, self.every_steps, self.tokens = prompt, every_steps, tokens
        self.sampling = Sampling(temperature, top_k, top_p, seed)
        self.sampled = 0  # the step

    def start(self, run: Run) -> None:
        """See Hook."""
        known = run.data.known()
        if "tokenizer" not in known or "block" not in known:
            raise ConfigError(
                "train.hooks: got SampleText of a data set without a tokenizer, expected one of text; for example "
                "--data.name text, or --data.args.tokenizer with data.args.tokens"
            )
        self.numbers = self._writer(run).tokens_of(self.prompt, "train.hooks: SampleText: prompt")

    def after_step(self, run: Run) -> None:
        """See Hook. Collective."""
        pieces = []
        with in_eval(run.work.model), run.work.average.used(), uncompiled(run.config.compile.mode != "off"):
            for (piece,) in self._writer(run).write([self.numbers], self.tokens, self.sampling, stops=False):
                pieces.append(piece)
                run.control.phases.progressed()
        self.sampled = run.step
        run.say(f"-- step {run.step}: {self.prompt}{''.join(pieces)}")

    def end(self, run: Run) -> None:
        """See Hook. A run that was asked to end has no time for it."""
        finished = run.step == run.total_steps or run.stopped is not None
        if finished and self.sampled != run.step:
            self.after_step(run)

    def _writer(self, run: Run) -> Writer:
        known, model = run.data.known(), run.parts.model
        return Writer(model, run.model, known["tokenizer"], context_of(model, run.data), run.world.device)
