"""Writes a lab's report: Markdown, one self-contained HTML page, pictures, and the same figures for TensorBoard."""

from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.fit.card import CARD_FILE
from homelab_scaling.report import tensorboard
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import to_html, to_markdown
from homelab_scaling.report.figures import NoPicture, Picture, draw_all
from homelab_scaling.report.isoflop_study import write_isoflop_study
from homelab_scaling.report.story import tell


def write_report(lab: Path) -> Path:
    """The path of report.html, written with report.md and *.png into LAB/<ladder>/report.

    It is written whatever the state of the lab: diverged, failed or missing runs are told, not hidden.

    Raises:
        SpecError: `lab` is no folder.
        MachineError: the report's folder cannot be written.
    """
    view = collect(lab)
    pictures = draw_all(view)
    blocks = tell(view, pictures)
    title = f"Scaling law: {view.name}"
    folder = lab / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [picture for picture in pictures if isinstance(picture, Picture)]
        for picture in pictures:
            if isinstance(picture, NoPicture):
                (folder / f"{picture.name}.png").unlink(missing_ok=True)
        for picture in drawn:
            (folder / f"{picture.name}.png").write_bytes(picture.light_png)
        tensorboard.write_summaries(lab / "tensorboard", view, drawn)
    except OSError as error:
        raise MachineError(f"{folder}: could not be written ({error.strerror}); free space or fix its rights") from None
    write_isoflop_study(view, pictures)
    if view.study.card is not None:
        codec.write_json(folder / CARD_FILE, view.study.card)
    codec.write_text(folder / "report.md", to_markdown(title, blocks))
    path = folder / "report.html"
    codec.write_text(path, to_html(title, blocks))
    return path
