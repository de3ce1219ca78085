"""Everything about the package is in settings.ini: edit there, not here."""
from configparser import ConfigParser
import shlex

import setuptools

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setuptools.setup(
    name=settings["lib_name"], version=settings["version"],
    description=settings["description"], keywords=settings["keywords"],
    author=settings["author"], author_email=settings["author_email"],
    url=settings["git_url"], license="Apache-2.0",
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
    python_requires=">=" + settings["min_python"],
    packages=setuptools.find_packages(include=[settings["lib_path"] + "*"]),
    install_requires=shlex.split(settings["requirements"]),
    extras_require={"dev": shlex.split(settings["dev_requirements"])},
    entry_points={"nbdev": [f'{settings["lib_path"]}={settings["lib_path"]}._modidx:d']})
