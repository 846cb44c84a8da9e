"""The modules of the client, which need the extra ``client``. Services import it from ``keepstream`` itself."""
