// Browsers run no worker on a page that was opened as a file: the search runs in a frame there. The theme knows the name.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = Object.assign(document.createElement("iframe"), { hidden: true })
      frame.srcdoc = `<script src="${url}"></` + "script>"
      this.ready = new Promise(resolve => frame.addEventListener("load", () => resolve(frame.contentWindow)))
      document.documentElement.appendChild(frame)
      this.addEventListener("message", event => this.onmessage && this.onmessage(event))
      this.ready.then(inside => {
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      })
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
  }
}
