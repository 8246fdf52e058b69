"""What was trained on: the sources of a corpus, their shares, what was repeated and what was dropped."""

from homelab_scaling.data import shares
from homelab_scaling.fit.words import listed, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Grid, Paragraph
from homelab_scaling.specs import NEARLY_AS_GOOD_EPOCHS, CorpusManifest


def sources(view: LabView) -> list[Block]:
    """The table of sources, where there is more to say than that there was one text and every token of it was new."""
    corpus = view.corpus
    if corpus is None or not corpus.mixture:
        return []
    repeats = corpus.n_tokens_unique < corpus.train.n_tokens
    dropped = f"Duplicates: {shares.dropped_words(corpus)}."
    if len(corpus.mixture) == 1 and not repeats:
        return [Paragraph(text=dropped)] if corpus.near_duplicates is not None else []
    grid = Grid(
        head=shares.HEAD,
        rows=tuple(shares.rows(corpus)),
        left=frozenset({"source", "asked"}),
        caption="The training text by source, repetitions counted; the share is that of its bytes. Documents are "
        "different ones, epochs are passes over all that the source has to train on. Held out: tokens, none of them "
        f"trained on. Dropped: documents that another one stands for. {dropped}",
    )
    return [grid, Paragraph(text=_about_repeats(corpus))] if repeats else [grid]


def _about_repeats(corpus: CorpusManifest) -> str:
    again = shares.repeated(corpus)
    said = listed([f"{name} {epochs:.1f} times" for name, epochs in again])
    text = (
        f"One pass over this text reads {said}: {short(corpus.train.n_tokens)} tokens, of which "
        f"{short(corpus.n_tokens_unique)} are different; n_tokens_unique in runs.csv counts what each row met. Up to "
        f"{NEARLY_AS_GOOD_EPOCHS} passes, repeated text is nearly as good as new text, beyond that it is worth "
        "ever less (Muennighoff et al. 2023)"
    )
    beyond = [name for name, epochs in again if epochs > NEARLY_AS_GOOD_EPOCHS]
    return f"{text}; {listed(beyond)} {'is' if len(beyond) == 1 else 'are'} beyond." if beyond else f"{text}."
