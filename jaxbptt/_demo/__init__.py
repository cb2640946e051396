"""The main job, `python -m jaxbptt`: built on what `jaxbptt` exports and nothing private."""
