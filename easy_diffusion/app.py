"""A local web page to play with the trained networks: python -m easy_diffusion.app

The page generates a dish from its name and shows its denoising trajectory, inpaints what is drawn
over with a brush, on the dish or on a photograph, and makes the film of a camera move. What the
buttons do is in app_requests.py. Only this computer can open the page, and no data leaves it. It
computes one request at a time; others wait.

It needs gradio (requirements-app.txt; `make app` installs it).

>>> from .presets import build_networks
>>> from .pretrained import Model
>>> model = Model(*build_networks("番茄汤"), autoencoder=None)       # random weights
>>> build_page(Requests(model, size=64)).title
'Easy Diffusion'
"""

import argparse
import random
import sys
from pathlib import Path

from datasets.dishes import dish_names

from .animation.camera import MOVES
from .animation.film import FORMATS
from .app_requests import SAMPLERS, SHOWN, Requests, gr
from .command_line import run_command
from .pretrained import WEIGHTS, find_sizes, load_model
from .training.distributed import check_gpu

INTRODUCTION = """# Easy Diffusion · 文生动图
输入菜名生成图像,涂抹重绘,再让镜头动起来。
Generate a dish from its Chinese name, inpaint parts of it, and let the camera move."""


def build_page(requests: Requests) -> gr.Blocks:
    """Lay out the page and connect its buttons with the requests."""
    names = random.Random(0).sample(dish_names("train") + dish_names("held_out"), 11)
    page = gr.Blocks(
        title="Easy Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    )
    plain = dict(show_label=False, interactive=False, buttons=[])
    with page:
        gr.Markdown(INTRODUCTION)
        message = gr.Markdown(elem_id="message")
        image, dish = gr.State(), gr.State("")
        with gr.Row():
            with gr.Column():
                name = gr.Textbox("番茄炒鸡蛋", label="菜名 Dish", elem_id="name")
                gr.Examples(["番茄炒鸡蛋", *names], name, label="例如 Suggestions")
                seed = gr.Number(0, precision=0, minimum=0, label="随机种子 Seed")
                sampler = gr.Dropdown([*SAMPLERS], label="采样器 Sampler")
                steps = gr.Slider(4, 100, 25, step=1, label="步数 Steps", elem_id="steps")
                guidance = gr.Slider(1, 6, 2, step=0.5, label="引导强度 Guidance scale")
                generate = gr.Button("生成 Generate", variant="primary", elem_id="generate")
                photo = gr.Image(sources=["upload"], type="filepath", height=160, elem_id="photo",
                                 label="或上传照片 Or upload a photograph")
            with gr.Column():
                gr.Markdown("图像:涂抹要重绘的区域 · Image: draw on the region to inpaint")
                editor = gr.ImageEditor(
                    sources=(), transforms=(), layers=False, canvas_size=(SHOWN, SHOWN), height=560,
                    brush=gr.Brush(default_size=40, colors=["#ffffff"]), elem_id="editor",
                    show_label=False,
                )
                region = gr.Textbox(
                    label="重绘为(留空则延续周围)Inpaint as; empty: as the surroundings"
                )
                inpaint = gr.Button("重绘 Inpaint", elem_id="inpaint")
            with gr.Column():
                move = gr.Dropdown([*MOVES], value="circle", label="镜头 Camera move")
                seconds = gr.Slider(1, 8, 4, step=0.5, label="时长(秒)Length in seconds")
                file_format = gr.Radio([*FORMATS], value="gif", label="格式 Format")
                film = gr.Button("制作动画 Make the film", variant="primary", elem_id="film")
                animation = gr.Image(type="filepath", height=300, elem_id="animation", **plain)
                video = gr.Video(visible=False, autoplay=True, loop=True, height=300, **plain)
                file = gr.File(label="下载 Download", height=80, elem_id="file")
        gr.Markdown("去噪轨迹:各时间步预测的 x0 · Denoising trajectory: the predicted x0")
        strip = gr.Image(elem_id="strip", **plain)

        one_at_a_time = dict(concurrency_limit=1, concurrency_id="model")
        sampling = [seed, steps, guidance]
        gr.on([generate.click, name.submit], requests.generate, [name, *sampling, sampler],
              [message, image, dish, editor, strip], **one_at_a_time)
        photo.upload(requests.upload, photo, [message, image, dish, editor], **one_at_a_time)
        inpaint.click(requests.inpaint, [image, editor, region, *sampling],
                      [message, image, editor], **one_at_a_time)
        film.click(requests.animate, [image, dish, move, seconds, file_format, *sampling],
                   [message, animation, video, file], **one_at_a_time)
    return page


def main(arguments=None) -> int:
    """Load the networks and serve the page until Ctrl+C; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.app", description="Serve a local page with the networks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
                        help="folder with the trained networks; those of the largest size are used")
    parser.add_argument("--port", type=int, help="port of the page; default: a free one from 7860")
    options = parser.parse_args(arguments)
    check_gpu()
    requests = Requests(load_model(options.weights), find_sizes(options.weights)[-1])
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page = build_page(requests).queue()
    page.launch(
        server_name="127.0.0.1", server_port=options.port, share=False, theme=theme, footer_links=[]
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
