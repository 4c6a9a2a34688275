// html-manager calls the MathJax 2 interface; the book ships MathJax 3.
(function () {
  if (!window.MathJax || window.MathJax.Hub) return;
  window.MathJax.Hub = {
    Queue: function (command) {
      var element = command && command[2];
      if (!element || !MathJax.startup || !MathJax.startup.promise) return;
      MathJax.startup.promise.then(function () {
        return MathJax.typesetPromise([element]);
      });
    },
  };
})();
