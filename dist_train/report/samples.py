"""What a page shows of single samples, and tables: without a script."""

import base64
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from dist_train.report.images import colour_of, mask, picture
from dist_train.report.panels import Gallery, MaskGallery, Rows
from dist_train.report.summary import ABSENT
from dist_train.report.text import number, percent

MOST_IN_LEGEND = 40


def gallery(panel: Gallery) -> str:
    """Samples of a classification: picture, true class, what the model says, and how sure it is."""
    figures = []
    for wrong in panel.worst:
        true, predicted = panel.classes[wrong.true], panel.classes[wrong.predicted]
        right = wrong.true == wrong.predicted
        said = "right" if right else f"→ {predicted}"
        figures.append(
            f"""<figure><img src="{_png(picture(wrong.image))}" alt="{escape(f"test sample {wrong.index}: {true}")}">
<figcaption>{escape(true)} <span class="said{"" if right else " wrong"}">{escape(said)}, {wrong.confidence:.0%}</span>
<span class="soft">loss {number(wrong.loss)}, #{wrong.index:,}</span></figcaption></figure>"""
        )
    note = "Test samples by number: the true class, what the model says, and how sure it is."
    return _card(panel.key, panel.title, note, f'<div class="gallery">{"".join(figures)}</div>')


def masks(panel: MaskGallery) -> str:
    """Samples of a segmentation: picture, true and predicted mask."""
    figures = []
    for wrong in panel.worst:
        images = [("picture", picture(wrong.image))] if wrong.image is not None else []
        images += [("true", mask(wrong.true)), ("predicted", mask(wrong.predicted))]
        shown = "".join(
            f'<span><img src="{_png(image)}" alt="{escape(f"{what}, test sample {wrong.index}")}"><i>{what}</i></span>'
            for what, image in images
        )
        figures.append(
            f"""<figure><div class="masks">{shown}</div><figcaption>#{wrong.index:,}
<span class="soft">loss {number(wrong.loss)}, {percent(wrong.right)} of its pixels right</span></figcaption></figure>"""
        )
    both = [numbers for wrong in panel.worst for numbers in (wrong.true, wrong.predicted)]
    present = np.unique(np.concatenate([numbers.ravel() for numbers in both])).tolist()
    names = [(one, panel.classes[one] if one >= 0 else "does not count") for one in present]
    legend = "".join(
        f'<li><span class="swatch" style="background: rgb{colour_of(one)}"></span>{escape(name)}</li>'
        for one, name in names[:MOST_IN_LEGEND]
    )
    more = f"<li>and {len(names) - MOST_IN_LEGEND} more</li>" if len(names) > MOST_IN_LEGEND else ""
    body = f'<ul class="legend">{legend}{more}</ul><div class="gallery wide">{"".join(figures)}</div>'
    return _card(panel.key, panel.title, "Test samples by number: the largest loss, a mean over their pixels.", body)


def table(panel: Rows) -> str:
    """A table, as it is given."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in panel.columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in panel.rows)
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    return f"""<figure class="card rows" data-panel="{escape(panel.key)}">
<figcaption class="head"><h3>{escape(panel.title)}</h3>{note}</figcaption>
<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"""


def _cell(cell: str | float | bytes | None) -> str:
    if cell is None:
        return ABSENT
    if isinstance(cell, bytes):
        return f'<img src="data:image/png;base64,{base64.b64encode(cell).decode()}" alt="">'
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return escape(cell) if isinstance(cell, str) else number(cell)


def _card(key: str, title: str, note: str, body: str) -> str:
    return f"""<section class="card" data-panel="{escape(key)}"><div class="head"><h3>{escape(title)}</h3>
<p class="note">{note}</p></div>
{body}</section>"""


def _png(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
