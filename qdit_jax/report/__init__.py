"""Pages, pictures and charts."""

from qdit_jax.report.clips import (
    CLIPS,
    FPS,
    check_clip,
    frame_numbers,
    frame_rows,
    is_video,
    save_clip,
)
from qdit_jax.report.figures import range_histograms
from qdit_jax.report.films import FilmFacts, film_facts, save_film
from qdit_jax.report.html import animation, heading, paragraph, picture, table, write_report
from qdit_jax.report.media import (
    image_grid,
    save_grid,
    save_picture,
    side_by_side,
    to_uint8,
)
from qdit_jax.report.model_card import model_card
from qdit_jax.report.model_page import check_report_folder, write_model_report
from qdit_jax.report.model_stats import (
    GROUP_SIZE,
    block_layers,
    group_text,
    input_ranges,
    kernel_of,
    part_of,
    shown_group_sizes,
    weight_ranges,
)
from qdit_jax.report.provenance import provenance, provenance_text

__all__ = [
    "CLIPS",
    "FPS",
    "GROUP_SIZE",
    "FilmFacts",
    "animation",
    "block_layers",
    "check_clip",
    "check_report_folder",
    "film_facts",
    "frame_numbers",
    "frame_rows",
    "group_text",
    "heading",
    "image_grid",
    "input_ranges",
    "is_video",
    "kernel_of",
    "model_card",
    "paragraph",
    "part_of",
    "picture",
    "provenance",
    "provenance_text",
    "range_histograms",
    "save_clip",
    "save_film",
    "save_grid",
    "save_picture",
    "shown_group_sizes",
    "side_by_side",
    "table",
    "to_uint8",
    "weight_ranges",
    "write_model_report",
    "write_report",
]
