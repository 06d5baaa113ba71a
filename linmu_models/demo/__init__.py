"""A page on which a teacher and its student answer the same question, side by side: `linmu demo`.

`pair` asks the two models, `shelf` keeps what is uploaded, `server` is the page's server, `page/` the page itself.
"""
