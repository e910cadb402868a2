"""The looks of the page: theme, logo, styles."""

from urllib.parse import quote

import gradio as gr

FONTS = (
    "ui-rounded",
    "Nunito",
    "Segoe UI",
    "system-ui",
    "-apple-system",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)
MONO_FONTS = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
THEME = gr.themes.Soft(
    primary_hue="orange",
    secondary_hue="amber",
    neutral_hue="stone",
    radius_size="lg",
    font=FONTS,  # those of the visitor's machine: the page fetches nothing from elsewhere
    font_mono=MONO_FONTS,
).set(
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*body_text_color_subdued",
    block_label_text_color_dark="*body_text_color_subdued",
    block_label_text_weight="500",
    block_border_width="1px",
    block_border_width_dark="1px",
    input_border_width="1px",
    input_border_width_dark="1px",
    input_shadow="none",
    checkbox_border_width="1px",
    checkbox_border_color="*neutral_400",
)
LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="A corgi">'
    '<path d="M8 30 6 6q0-4 4-2l18 14zM56 30 58 6q0-4-4-2L36 18z" fill="#e8893a"/>'
    '<path d="M12 24l-2-14 12 10zM52 24l2-14-12 10z" fill="#f9c9b6"/>'
    '<path d="M32 14c16 0 26 11 26 24 0 14-12 22-26 22S6 52 6 38c0-13 10-24 26-24z" fill="#f19a4b"/>'
    '<path d="M32 14c3 0 4 3 5 9 2 9 15 12 15 22 0 9-9 15-20 15s-20-6-20-15c0-10 13-13 15-22 1-6 2-9 5-9z" '
    'fill="#fff7ee"/>'
    '<circle cx="20" cy="35" r="3.6" fill="#33231a"/><circle cx="44" cy="35" r="3.6" fill="#33231a"/>'
    '<path d="M27 42h10q1 5-5 6-6-1-5-6z" fill="#33231a"/>'
    '<path d="M28 52h8v3a4 4 0 0 1-8 0z" fill="#f0788c"/>'
    '<path d="M24 50q4 4 8-1 4 5 8 1" fill="none" stroke="#33231a" stroke-width="2"/></svg>'
)
HEADER = f'<header id="header">{LOGO}<div><h1>Corgi</h1><p>A few words in, an emoji out.</p></div></header>'
HEAD = f'<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,{quote(LOGO)}">'
CSS = """
.gradio-container > .main { max-width: 1120px !important; margin: 0 auto; }
.gradio-container > .main { padding: 16px clamp(12px, 3vw, 32px) !important; }
#header { display: flex; align-items: center; gap: 14px; }
#header svg { width: 60px; height: 60px; flex: none; }
#header h1 { margin: 0; font-size: 30px; font-weight: 800; letter-spacing: -0.02em; line-height: 1.1; }
#header p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.prompt textarea { font-size: 20px; line-height: 28px; padding: 15px 18px; min-height: 60px; }
.go { font-size: 20px; font-weight: 700; min-height: 60px; }
#examples .label, #examples .label-wrap { display: none; }
input[type=range]::-webkit-slider-thumb { box-shadow: 0 0 0 1px #a8a29e, 0 1px 3px rgb(0 0 0 / 0.25); }
input[type=range]::-moz-range-thumb { box-shadow: 0 0 0 1px #a8a29e, 0 1px 3px rgb(0 0 0 / 0.25); }
.seed input, .bordered input, .bordered textarea { border: 1px solid var(--border-color-primary); }
/* One picture, 2 x 2 or 3 x 3 fill the same square, so that nothing jumps when they arrive. */
#gallery { height: auto !important; aspect-ratio: 1; max-height: 600px; }
#gallery .grid-wrap { height: 100% !important; max-height: none; }
#gallery .grid-container { max-width: 586px; margin: 0 auto; }
#gallery .grid-container:has(> :nth-child(5)) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
#gallery .caption-label { opacity: 0; max-width: 95%; font-size: 12px; }
#gallery button:hover .caption-label, #gallery button:focus-visible .caption-label { opacity: 1; }
#gallery .empty::after { content: "Your picture appears here"; color: var(--body-text-color-subdued); }
#gallery .empty { display: flex; flex-direction: column; gap: 8px; }
.hint, .note { padding: 0 !important; }
.hint p, .note p { margin: 0; font-size: 13px; line-height: 18px; color: var(--body-text-color-subdued); }
.hint p { text-align: center; min-height: 18px; }
#no_upsampler { padding: 48px 0 !important; }
#no_upsampler p { max-width: 560px; margin: 0 auto; font-size: 16px; line-height: 24px; text-align: center; }
/* What goes in and what comes out stand side by side, as large as each other, with or without a picture. */
.square { height: 520px !important; min-height: 0; }
.square .image-frame, .square .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.square .empty::after { color: var(--body-text-color-subdued); }
#edit_result .empty::after { content: "The result appears here"; }
.square .empty { display: flex; flex-direction: column; gap: 8px; }
#edit_mask [title="Color"] { display: none; }
#mode { padding: 4px 0; }
#visit { margin-top: 12px; padding-top: 20px; border-top: 1px solid var(--border-color-primary); }
#visit h2 { margin: 0; font-size: 16px; font-weight: 700; }
#history { border: 0; padding: 0; }
#history .grid-wrap { padding: 0; }
#history .grid-container { grid-template-columns: repeat(auto-fill, 88px) !important; grid-auto-rows: 88px; }
#history .thumbnail-lg { width: 88px; height: 88px; }
@media (max-width: 640px) {
  .square { height: calc(100vw - 24px) !important; }
  #header svg { width: 46px; height: 46px; }
  #header h1 { font-size: 24px; }
}
"""
