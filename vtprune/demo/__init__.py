# SPDX-License-Identifier: Apache-2.0
"""`vtprune demo`: a local page that shows what methods keep of a picture, and what the model answers then.

`comparison` runs a `Setting` on a picture or clip and needs no Gradio; `page` lays it out, `serve` opens it.
"""
